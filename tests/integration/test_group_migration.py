"""Consumer groups and databases that do not know each other: whose offsets count, and what is read again."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from click.testing import CliRunner, Result

from deploy.local.postgres import PostgresServer
from deploy.local.stack import Stack
from sinks.database import connect, connect_pool
from streams.settings import ROLES, Settings
from tests import consumed
from tests.topology import Event, Topology, settings_for, until
from tidemark.main import main

_SENT = 40


@asynccontextmanager
async def running(settings: Settings, roles: Sequence[str] = ("intake",), sent: int = 0) -> AsyncIterator[Topology]:
    stack = Stack(settings, roles=roles)
    await stack.start()
    pool = await connect_pool(settings.dsn, size=2)
    try:
        yield Topology(stack, pool, sent)
        assert stack.restarts == 0
    finally:
        await pool.close()
        await stack.stop()


def prices(first: int, last: int) -> list[Event]:
    """Each of a date of its own."""
    return [
        ("prices", {"security_id": "S", "price_date": f"{2000 + n // 28}-02-{n % 28 + 1:02}", "price": n + 1})
        for n in range(first, last)
    ]


async def stored(topology: Topology) -> int:
    return await topology.pool.fetchval("select count(*) from market_prices")


async def consume(topology: Topology, events: list[Event], rows: int) -> None:
    await topology.send(events)

    async def are_there() -> bool:
        return await stored(topology) == rows

    await until(are_there, f"{rows} rows")


async def take_one_out(topology: Topology) -> None:
    """If it comes back, then its record was read again."""
    await topology.pool.execute("delete from market_prices where price = 1")


async def committed(settings: Settings) -> int:
    """By the group, in Kafka."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(settings.group("intake"))
        partition = TopicPartition(settings.topic("prices"), 0)
        return found[partition].offset if partition in found else -1
    finally:
        await admin.close()


@pytest.fixture
async def settings(kafka: str, empty_database: str, folder: Path) -> Settings:
    """After a first run: the records are in Postgres, Kafka's committed offset has followed."""
    settings = settings_for(kafka, empty_database, folder, input_partitions=1)
    async with running(settings) as topology:
        await consume(topology, prices(0, _SENT), _SENT)

        async def has_followed() -> bool:
            return await committed(settings) == _SENT

        await until(has_followed, "Kafka's committed offset")
        await take_one_out(topology)
    return settings


async def test_a_fresh_group_starts_at_the_logs_beginning_and_makes_the_same_books(settings: Settings) -> None:
    """Kafka's commits do not count: the group has committed the end, and Postgres knows nothing of it."""
    connection = await connect(settings.dsn)
    await connection.execute("delete from kafka_offsets")
    await connection.close()
    async with running(settings) as topology:
        await consume(topology, prices(_SENT, _SENT + 5), _SENT + 5)  # the one that was taken out is back
        assert await topology.pool.fetchval("select count(*) from corrections") == 0


async def test_a_renamed_group_goes_on_where_the_former_one_ended(settings: Settings) -> None:
    connection = await connect(settings.dsn)
    await connection.execute("update kafka_offsets set consumer_group = 'former'")  # as the former one left it
    # The documented statement, with all workers stopped:
    await connection.execute(
        "update kafka_offsets set consumer_group = $1 where consumer_group = 'former'", settings.group("intake")
    )
    await connection.close()
    async with running(settings) as topology:
        await consume(topology, prices(_SENT, _SENT + 5), _SENT + 4)


async def test_a_database_newer_than_kafkas_commits_reads_nothing_again(settings: Settings) -> None:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers,
        group_id=settings.group("intake"),
        enable_auto_commit=False,  # else its stop commits the position it fetched before
    )
    await consumer.start()
    partition = TopicPartition(settings.topic("prices"), 0)
    consumer.assign([partition])
    await consumer.commit({partition: 3})
    await consumer.stop()
    assert await committed(settings) == 3
    async with running(settings) as topology:
        await consume(topology, prices(_SENT, _SENT + 5), _SENT + 4)

        async def has_followed() -> bool:
            return await committed(settings) == _SENT + 5

        await until(has_followed, "Kafka's committed offset")


def trade(n: int, day: int, quantity: int) -> Event:
    return "transactions", {
        "transaction_id": f"t{n}", "portfolio_id": "P", "security_id": "S", "transaction_type": "BUY",
        "transaction_date": f"2025-01-{day:02}T10:00:00Z", "quantity": quantity, "price": 2,
        "gross_transaction_amount": str(Decimal(2 * quantity)),
    }  # fmt: skip


def price(day: int, value: int, revision: int = 0) -> Event:
    record = {"security_id": "S", "price_date": f"2025-01-{day:02}", "price": value, "revision": revision}
    return "prices", record


async def test_a_restored_database_goes_on_as_a_new_generation(
    kafka: str, postgres: PostgresServer, empty_database: str, folder: Path
) -> None:
    """Older than Kafka's commits. It is only started: nothing is numbered twice, and consumers are right again."""
    before = settings_for(kafka, empty_database, folder, input_partitions=1, repair_after_seconds=1)
    async with running(before, ROLES) as topology:
        await topology.send([("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in (1, 2, 3)])
        await topology.send([trade(1, 1, 10), price(1, 5)])
        await topology.settle()
    name = empty_database.rsplit("/", 1)[1]
    copy = f"{name}_copy"
    server = await connect(postgres.url("postgres"))
    try:
        await server.execute(f"create database {copy} template {name}")  # the backup
        async with running(before, ROLES, sent=5) as topology:
            await topology.send([price(1, 6, 1), price(2, 7), trade(2, 2, 5), trade(3, 1, 4)])
            await topology.settle()
            assert await topology.pool.fetchval("select generation from installation") == 0
            ids = await event_ids(topology)
            seq = await topology.pool.fetchval("select max(seq) from corrections")
        restored = before.model_copy(update={"database_url": type(before.database_url)(postgres.url(copy))})
        found = json.loads((await after_restore(restored, "--json")).output)
        assert (found["has_lost"], found["is_open"], found["generation"]) == (True, False, 0)
        assert (found["keys"], found["reaches_back"]) == (1, True)
        assert found["jobs"] > 0
        assert found["event_id"] >= max(ids)
        assert found["seq"] >= seq
        assert "1 positions" in (await after_restore(restored)).output
        async with running(restored, ROLES, sent=9) as topology:
            await topology.settle()
            audit = await topology.audit()
            assert (audit.differences, audit.waiting) == ([], [])
            assert await topology.pool.fetchval("select count(*) from transactions") == 3
            assert await topology.pool.fetchval("select max(seq) > $1 from corrections", seq)
            assert await topology.pool.fetchval("select generation from installation") == 1
            again = await event_ids(topology)
            assert min(again - ids) > max(ids)
            assert len(again) > len(ids)
            assert await consumed.check(restored, topology.pool, random.Random(1)) == []
        assert "has lost nothing" in (await after_restore(restored)).output
    finally:
        await server.execute(f"drop database if exists {copy} with (force)")
        await server.close()


async def after_restore(settings: Settings, *options: str) -> Result:
    found = await asyncio.to_thread(CliRunner().invoke, main, ["after-restore", *options], env=settings.environment())
    assert found.exit_code == 0, found.output
    return found


async def event_ids(topology: Topology) -> set[int]:
    topics = ("reprocessing-triggers", "reprocessing-status", "transactions-processed", "position-valuations")
    records: list[Any] = [record for topic in topics for record in await topology.read(topic)]
    return {int(dict(record.headers)["event_id"]) for record in records}
