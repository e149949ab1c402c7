"""One embedded Postgres and, where a test asks for it, one embedded Kafka per run; each test has its own database."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.kafka import KafkaServer
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from sinks.database import Pool, connect_pool, migrate
from tests.servers import serving

_ANOTHER_POSTGRES = "TIDEMARK_TEST_POSTGRES_BIN"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another Postgres than the embedded one: only what needs Postgres, and Postgres alone."""
    if not os.environ.get(_ANOTHER_POSTGRES):
        return
    needed = [set(getattr(item, "fixturenames", ())) for item in items]
    other = [item for item, names in zip(items, needed, strict=True) if "postgres" not in names or "kafka" in names]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in set(other)]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Where the run's servers live."""
    path = Path(tempfile.mkdtemp(prefix="tidemark-test-"))
    path.chmod(0o711)  # started by root, Postgres runs as a user of its own
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
async def postgres(folder: Path) -> AsyncIterator[PostgresServer]:
    """The run's Postgres: the embedded one, or that whose programs are in TIDEMARK_TEST_POSTGRES_BIN."""
    bin_folder = Path(named) if (named := os.environ.get(_ANOTHER_POSTGRES)) else None
    server = PostgresServer(folder / "postgres", folder / "postgres.log", Ports(folder / "ports.json"), bin_folder)
    async with serving("postgres", server):
        yield server


@pytest.fixture(scope="session")
async def kafka(folder: Path) -> AsyncIterator[str]:
    """The address of the run's Kafka, kafka://host:port."""
    server = KafkaServer(folder / "kafka", folder / "kafka.log", Ports(folder / "ports.json"))
    async with serving("kafka", server):
        yield server.url


@pytest.fixture
async def database(postgres: PostgresServer) -> AsyncIterator[str]:
    """The address of a fresh, migrated database, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    dsn = await postgres.create_database(name)
    try:
        await migrate(dsn)
        yield dsn
    finally:
        await postgres.drop_database(name)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    """Sessions in the fresh database, as a worker has them."""
    async with await connect_pool(database) as opened:
        yield opened


@pytest.fixture
async def empty_database(postgres: PostgresServer) -> AsyncIterator[str]:
    """The address of a fresh database without a schema, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield await postgres.create_database(name)
    await postgres.drop_database(name)
