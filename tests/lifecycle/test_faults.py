"""What is not as a worker needs it: one line that says what to do, and it does not start."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from sinks import method
from sinks.database import connect
from sinks.model import CostBasisMethod
from streams import topics
from streams.settings import Settings
from streams.topics import TopicError, ensure_topics
from tests.engine import Engine
from tests.refused import refused
from tests.topology import settings_for


@pytest.fixture
async def settings(kafka: str, database: str, folder: Path) -> Settings:
    """Of an installation in which nothing is wrong yet."""
    found = settings_for(kafka, database, folder)
    await ensure_topics(found)
    return found


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("drop schema tidemark cascade", "the database has no schema of this program yet: run `tidemark migrate`"),
        ("delete from schema_migrations where version = 8", "the database lacks migration backlog: run `tidemark mi"),
        (
            "insert into schema_migrations values (9999, 'later', 'x')",
            "the database has migration 9999, newer than this program can work on: upgrade tidemark",
        ),
    ],
)
async def test_another_schema(settings: Settings, tmp_path: Path, statement: str, said: str) -> None:
    connection = await connect(settings.dsn)
    await connection.execute(statement)
    await connection.close()
    assert said in await refused(settings, "books", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("tidemark:", "nobody:"), 'cannot reach the database: password authentication failed for user "nobody"'),
        (("/test_", "/no_"), "cannot reach the database: database"),
    ],
)
async def test_another_database(settings: Settings, tmp_path: Path, change: tuple[str, str], said: str) -> None:
    named = settings.model_copy(update={"database_url": type(settings.database_url)(settings.dsn.replace(*change))})
    assert said in await refused(named, "books", tmp_path)


@pytest.mark.parametrize(("of_books", "of_worker"), [("FIFO", "AVCO"), ("AVCO", "FIFO")])
async def test_another_cost_basis_method(
    settings: Settings, tmp_path: Path, of_books: CostBasisMethod, of_worker: CostBasisMethod
) -> None:
    engine = await Engine.on(settings.dsn, of_books)
    trade = {"portfolio_id": "P", "security_id": "S", "transaction_date": "2025-01-02", "price": 1}
    buy = {**trade, "transaction_id": "t1", "transaction_type": "BUY", "quantity": 2}
    await engine.take("transactions", [buy, {**buy, "transaction_id": "t2", "portfolio_id": "Q"}])
    await engine.take(
        "transactions", [{**buy, "transaction_id": "t3", "portfolio_id": "Q", "transaction_type": "SELL"}]
    )
    async with engine.pool.acquire() as connection:
        assert await method.of_books(connection) == of_books
    await engine.pool.close()
    named = settings.model_copy(update={"cost_basis_method": of_worker})
    said = f"the books are kept by {of_books}, but TIDEMARK_COST_BASIS_METHOD is {of_worker}: set it to {of_books}"
    assert said in await refused(named, "intake", tmp_path)


async def test_a_missing_topic(settings: Settings, tmp_path: Path) -> None:
    named = settings.model_copy(update={"topic_prefix": f"t{uuid.uuid4().hex[:8]}-"})
    line = await refused(named, "resets", tmp_path)
    assert f"no topic {named.topic(topics.BUSINESS_DATES)}, " in line
    assert line.endswith("create what is missing with `tidemark topics`")


async def test_another_number_of_partitions(settings: Settings, tmp_path: Path) -> None:
    more = settings.model_copy(update={"internal_partitions": 3})
    said = "has 2 partitions, but TIDEMARK_INTERNAL_PARTITIONS is 3: all internal topics must have that many"
    assert said in await refused(more, "triggers", tmp_path)
    with pytest.raises(TopicError, match=said):
        await ensure_topics(more)


@pytest.mark.parametrize("role", ["triggers", "resets"])
async def test_a_job_topic_that_forgets(settings: Settings, tmp_path: Path, role: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    jobs = settings.topic(topics.JOBS)
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, jobs, {topics.CLEANUP: "delete"})])
    await admin.close()
    said = f"topic {jobs} has cleanup.policy=delete, which removes what is still needed: set cleanup.policy=compact"
    assert said in await refused(settings, role, tmp_path)
    with pytest.raises(TopicError, match=said):
        await ensure_topics(settings)
