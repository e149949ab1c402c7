"""More partitions: of an input topic, and of the internal topics, by the procedures of docs/deploying.md."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from sinks.database import connect_pool
from streams import topics
from streams.settings import Settings
from tests.topology import Event, run_stack, settings_for, until

_SECURITIES = [f"S{n}" for n in range(20)]


@asynccontextmanager
async def administering(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


def history(day: int, price: int) -> list[Event]:
    """A price for every security."""
    return [
        ("prices", {"security_id": security, "price_date": f"2025-01-{day:02}", "price": price})
        for security in _SECURITIES
    ]


def opening() -> list[Event]:
    """Every security is held, priced and closed for five dates."""
    trades: list[Event] = [
        ("transactions", {
            "transaction_id": security, "portfolio_id": "P", "security_id": security, "transaction_type": "BUY",
            "transaction_date": "2025-01-01T10:00:00Z", "quantity": 1, "price": 2,
        })
        for security in _SECURITIES
    ]  # fmt: skip
    dates: list[Event] = [("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in range(1, 6)]
    return [*trades, *history(1, 10), *dates]


async def test_more_partitions_of_an_input_topic(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder)
    async with run_stack(settings) as topology:
        await topology.send(opening())
        await topology.settle()  # producers have stopped, and nothing is behind
        async with administering(settings) as admin:
            await admin.create_partitions({settings.topic(topics.PRICES): NewPartitions(5)})
    async with run_stack(settings, sent=len(opening())) as topology:
        await topology.send(history(3, 12))
        await topology.settle()
        read = await topology.pool.fetch(
            "select partition, next_offset from kafka_offsets where topic = $1", settings.topic(topics.PRICES)
        )
        assert len(read) == 5
        assert sum(row["next_offset"] for row in read if row["partition"] >= 2) > 0
        assert (await topology.audit()).agrees


async def test_more_partitions_of_the_internal_topics(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder, repair_after_seconds=2)
    late = history(2, 11)
    async with run_stack(settings) as topology:
        await topology.send(opening())
        await topology.settle()
        await topology.pool.execute("update reset_limit set paused = true")
        await topology.send(late)

        async def waiting() -> bool:
            return await topology.pool.fetchval("select count(*) from reprocessing_jobs where status = 'PENDING'") == 20

        await until(waiting, "twenty jobs that are held")
    more = settings.model_copy(update={"internal_partitions": 5})
    async with administering(settings) as admin:
        internal = [topic.name for topic in topics.all_topics(settings) if topic.fixed_partitions]
        await admin.delete_topics(internal)

        async def gone() -> bool:
            return not set(internal) & set(await admin.list_topics())

        await until(gone, "the internal topics removed")
    pool = await connect_pool(settings.dsn, size=1)
    await pool.execute("delete from kafka_offsets where topic = $1", settings.topic(topics.JOBS))
    await pool.execute("update reset_limit set paused = false")
    await pool.close()
    async with run_stack(more, sent=len(opening()) + len(late)) as topology:
        await topology.settle()
        # It found its local state ahead of the new changelog, removed it, and was started again.
        assert topology.stack.workers["triggers"].restarts <= 1
        topology.stack.workers["triggers"].restarts = 0
        assert (await topology.audit()).agrees
        assert await topology.pool.fetchval("select bool_and(right_at is not null) from corrections")
        assert await topology.pool.fetchval(
            "select count(*) from daily_position_snapshots where valuation_date = '2025-01-02' and price = 11"
        ) == len(_SECURITIES)
