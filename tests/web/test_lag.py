"""Consumer lag on real Kafka: whoever owns the offsets, whatever stands in the log, whoever is alive."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from click.testing import CliRunner

from deploy.local.stack import Stack
from sinks.database import connect
from streams.lag import PartitionLag, read_lag, topics_by_group
from streams.settings import Settings, load_named
from streams.topics import ensure_topics
from tests.exported import exported
from tests.topology import partitions
from tidemark.main import main

HOUR_MS = 3_600_000


class World:
    """Topics and a database of their own; no worker is alive unless a test starts one."""

    def __init__(self, settings: Settings, connection: asyncpg.Connection) -> None:
        self.settings = settings
        self.connection = connection

    async def send(self, topic: str, count: int, partition: int = 0, age_ms: int = 0, how: str = "plain") -> int:
        """Send records so old; returns the timestamp of the first. how: plain, committed or aborted transaction."""
        first = int(time.time() * 1000) - age_ms
        producer = AIOKafkaProducer(
            bootstrap_servers=self.settings.bootstrap_servers,
            transactional_id=None if how == "plain" else uuid.uuid4().hex,
        )
        await producer.start()
        if how != "plain":
            await producer.begin_transaction()
        sent = [
            await producer.send(
                self.settings.topic(topic), b"{}", key=b"k", partition=partition, timestamp_ms=first + number
            )
            for number in range(count)
        ]
        await asyncio.gather(*sent)
        if how == "committed":
            await producer.commit_transaction()
        if how == "aborted":
            await producer.abort_transaction()
        await producer.stop()
        return first

    async def stand(self, role: str, topic: str, position: int, partition: int = 0) -> None:
        """Postgres holds this position."""
        await self.connection.execute(
            """
            insert into kafka_offsets (consumer_group, topic, partition, next_offset, epoch) values ($1, $2, $3, $4, 1)
            on conflict (consumer_group, topic, partition) do update set next_offset = $4
            """,
            self.settings.group(role),
            self.settings.topic(topic),
            partition,
            position,
        )

    async def commit(self, role: str, topic: str, position: int, partition: int = 0) -> None:
        """Kafka holds this position."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.settings.bootstrap_servers,
            group_id=self.settings.group(role),
            enable_auto_commit=False,
        )
        await consumer.start()
        place = TopicPartition(self.settings.topic(topic), partition)
        consumer.assign([place])
        await consumer.commit({place: position})
        await consumer.stop()

    async def lag(self, role: str, topic: str, partition: int = 0) -> PartitionLag:
        """Of one partition."""
        (found,) = [
            row
            for row in await read_lag(self.settings, self.connection)
            if (row.consumergroup, row.topic, row.partition)
            == (self.settings.group(role), self.settings.topic(topic), partition)
        ]
        return found


@pytest.fixture
async def world(kafka: str, database: str, folder: Path) -> AsyncIterator[World]:
    prefix = f"l{uuid.uuid4().hex[:8]}-"
    settings = load_named(
        broker_url=kafka,
        database_url=database,
        data_dir=folder / prefix,
        topic_prefix=prefix,
        internal_partitions=2,
        input_partitions=2,
        session_timeout_seconds=6,
    )
    await ensure_topics(settings)
    connection = await connect(database)
    yield World(settings, connection)
    await connection.close()


async def test_every_partition_of_every_group_is_there_from_the_beginning(world: World) -> None:
    found = await read_lag(world.settings, world.connection)
    expected = {
        (group, topic, partition)
        for group, names in topics_by_group(world.settings).items()
        for topic in names
        for partition in range(partitions(world.settings)[topic])
    }
    assert {(row.consumergroup, row.topic, row.partition) for row in found} == expected
    assert {(row.position, row.lag, row.lag_seconds) for row in found} == {(None, 0, 0.0)}


@pytest.mark.parametrize(
    ("role", "topic"), [("intake", "prices"), ("triggers", "reprocessing-triggers"), ("books", "reprocessing-status")]
)
async def test_a_partition_that_was_never_read_is_behind_by_all_of_its_records(
    world: World, role: str, topic: str
) -> None:
    first = await world.send(topic, 7, partition=1, age_ms=HOUR_MS)
    before = time.time()
    found = await world.lag(role, topic, partition=1)
    assert (found.position, found.lag) == (None, 7)
    assert before - first / 1000 <= found.lag_seconds <= time.time() - first / 1000
    assert (await world.lag(role, topic)).lag == 0


async def test_postgres_position_counts_for_sinks_and_kafkas_for_the_others(world: World) -> None:
    first = await world.send("prices", 10, age_ms=HOUR_MS)
    await world.stand("intake", "prices", 4)
    await world.commit("intake", "prices", 9)  # follows as a courtesy; not the truth
    before = time.time()
    found = await world.lag("intake", "prices")
    assert (found.position, found.end_offset, found.lag) == (4, 10, 6)
    fourth = (first + 4) / 1000
    assert before - fourth <= found.lag_seconds <= time.time() - fourth

    await world.send("reprocessing-status", 10, age_ms=HOUR_MS)
    await world.commit("triggers", "reprocessing-status", 3)
    await world.commit("books", "reprocessing-status", 10)
    await world.stand("triggers", "reprocessing-status", 8)  # not how that group keeps its positions
    assert (await world.lag("triggers", "reprocessing-status")).lag == 7
    books = await world.lag("books", "reprocessing-status")
    assert (books.lag, books.lag_seconds) == (0, 0.0)


async def test_two_groups_at_different_places_of_one_partition(world: World) -> None:
    first = await world.send("reprocessing-status", 10, age_ms=HOUR_MS)
    await world.commit("triggers", "reprocessing-status", 2)
    await world.commit("books", "reprocessing-status", 5)
    triggers = await world.lag("triggers", "reprocessing-status")
    books = await world.lag("books", "reprocessing-status")
    assert (triggers.lag, books.lag) == (8, 5)
    assert first / 1000 + triggers.lag_seconds <= time.time()
    assert triggers.lag_seconds > HOUR_MS / 1000 - 1 < books.lag_seconds


async def test_markers_and_aborted_records_are_not_lag(world: World) -> None:
    await world.send("prices", 3, how="committed")  # 0-2, marker 3
    await world.stand("intake", "prices", 3)
    found = await world.lag("intake", "prices")
    assert (found.end_offset, found.lag, found.lag_seconds) == (4, 0, 0.0)

    await world.send("prices", 5, age_ms=2 * HOUR_MS, how="aborted")  # 4-8, marker 9
    assert (await world.lag("intake", "prices")).lag == 0

    first = await world.send("prices", 2, age_ms=HOUR_MS)  # 10-11
    before = time.time()
    found = await world.lag("intake", "prices")
    assert found.lag == 2
    assert before - first / 1000 <= found.lag_seconds <= time.time() - first / 1000


async def test_a_position_that_retention_has_passed_stands_at_the_logs_beginning(world: World) -> None:
    first = await world.send("prices", 10, age_ms=HOUR_MS)
    await world.stand("intake", "prices", 1)
    admin = AIOKafkaAdminClient(bootstrap_servers=world.settings.bootstrap_servers)
    await admin.start()
    await admin.delete_records({TopicPartition(world.settings.topic("prices"), 0): RecordsToDelete(before_offset=6)})
    await admin.close()
    before = time.time()
    found = await world.lag("intake", "prices")
    assert (found.position, found.lag) == (1, 4)
    assert before - (first + 6) / 1000 <= found.lag_seconds <= time.time() - (first + 6) / 1000


async def test_the_command_prints_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.send("prices", 5)
    for name, value in world.settings.environment().items():
        monkeypatch.setenv(name, value)

    def run(*args: str) -> str:
        result = CliRunner().invoke(main, ["lag", *args])
        assert result.exit_code == 0, result.output
        return result.output

    rows = json.loads(await asyncio.to_thread(run, "--json"))
    assert {(row["topic"], row["lag"]) for row in rows if row["lag"]} == {(world.settings.topic("prices"), 5)}
    assert "5 records behind" in await asyncio.to_thread(run)
    await world.stand("intake", "prices", 5)
    assert "nothing is behind" in await asyncio.to_thread(run)


async def test_a_broker_that_does_not_answer_is_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TIDEMARK_BROKER_URL", "kafka://127.0.0.1:1")
    result = await asyncio.to_thread(CliRunner().invoke, main, ["lag"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: cannot reach the broker: .*\n", result.output)


async def test_one_worker_exports_each_series_and_another_takes_over(world: World) -> None:
    """No worker of the groups `intake` and `resets` lives: their lag is reported all the same."""
    await world.send("prices", 5, age_ms=HOUR_MS)
    stack = Stack(world.settings, roles=["triggers", "books"])
    await stack.start()
    try:
        first = await _until_observed(stack, list(stack.workers))
        await stack.workers[first].stop()
        (other,) = set(stack.workers) - {first}
        assert await _until_observed(stack, [other]) == other
        group, topic = world.settings.group("intake"), world.settings.topic("prices")
        prices = f'consumergroup="{group}",partition="0",topic="{topic}"'
        samples = await exported(stack, other)
        assert samples[f"kafka_consumergroup_lag{{{prices}}}"] == 5
        assert samples[f"kafka_consumergroup_lag_seconds{{{prices}}}"] > HOUR_MS / 1000 - 1
    finally:
        await stack.stop()


async def _until_observed(stack: Stack, roles: list[str]) -> str:
    """The role whose worker exports the lag of every partition; each series may come from one worker only."""
    there = partitions(stack.settings)
    expected = sum(there[name] for names in topics_by_group(stack.settings).values() for name in names)
    async with asyncio.timeout(120):
        while True:
            samples = {role: await exported(stack, role) for role in roles}
            lags = {
                role: [s for s in found if s.startswith("kafka_consumergroup_lag{")] for role, found in samples.items()
            }
            assert all(count == 1 for count in Counter(s for found in lags.values() for s in found).values())
            for role, found in lags.items():
                if len(found) == expected and "outbox_events_pending" in samples[role]:
                    return role
            await asyncio.sleep(0.2)
