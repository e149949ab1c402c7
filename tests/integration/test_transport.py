"""From Kafka's log into Postgres: holes that are real, holes that are not, and logs that have lost the offset."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from deploy.local.stack import Stack
from sinks.database import connect, migrate
from streams.settings import Settings
from streams.topics import ensure_topics
from tests.gate import open_gate
from tests.topology import Topology, run_topology, settings_for, until

_HURRIED = {  # compaction as hard as it gets: a segment for nearly every record
    "cleanup.policy": "compact",
    "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.001",
    "max.compaction.lag.ms": "500",
    "delete.retention.ms": "100",
}


def price(number: int, **more: Any) -> bytes:
    """The nth price: of a date of its own, so that rows can be counted."""
    record = {"security_id": "S", "price_date": f"{2000 + number // 28}-02-{number % 28 + 1:02}", "price": 1, **more}
    return json.dumps(record).encode()


async def stored(dsn: str) -> int:
    connection = await connect(dsn)
    try:
        count: int = await connection.fetchval("select count(*) from market_prices")
        return count
    finally:
        await connection.close()


async def next_offset(dsn: str, topic: str) -> int:
    connection = await connect(dsn)
    try:
        return await connection.fetchval("select next_offset from kafka_offsets where topic = $1", topic) or 0
    finally:
        await connection.close()


async def send(settings: Settings, topic: str, values: Sequence[bytes], key: Any = lambda number: None) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    try:
        for number, value in enumerate(values):
            await producer.send(settings.topic(topic), value, key=key(number))
    finally:
        await producer.stop()


async def worker_that_ends(settings: Settings, program: Sequence[str] = ("-m", "tidemark")) -> str:
    """Run an intake worker until it ends by itself; its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *program, "worker", "intake",
        env={**__import__("os").environ, **settings.environment()},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 180)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 1, output.decode()
    return output.decode()


async def test_only_committed_records_of_transactional_producers_are_applied(
    kafka: str, empty_database: str, folder: Path
) -> None:
    async with run_topology(kafka, empty_database, folder, roles=["intake"], input_partitions=1) as topology:
        producer = AIOKafkaProducer(
            bootstrap_servers=topology.settings.bootstrap_servers, transactional_id=topology.settings.topic("writer")
        )
        await producer.start()
        try:
            kept = 0
            for round_ in range(40):
                await producer.begin_transaction()
                for _ in range(5):
                    await producer.send(topology.settings.topic("prices"), price(kept if round_ % 2 else 5_000))
                    kept += round_ % 2
                await (producer.commit_transaction() if round_ % 2 else producer.abort_transaction())
            await send(topology.settings, "prices", [price(kept)])
            await until(lambda: _stored_is(topology, kept + 1), "all that was committed")
            # 200 records, 40 markers, one record
            assert await next_offset(topology.settings.dsn, topology.settings.topic("prices")) == 241

            await producer.begin_transaction()
            await producer.send(topology.settings.topic("prices"), price(5_000))
            await producer.abort_transaction()
        finally:
            await producer.stop()

        async def end_is_stored() -> bool:
            return await next_offset(topology.settings.dsn, topology.settings.topic("prices")) == 243

        await until(end_is_stored, "the end of a log that ends in an aborted record and a marker")
        written = "select xmin::text from kafka_offsets where topic like '%prices'"
        before = await topology.pool.fetchval(written)
        await send(topology.settings, "business-dates", [b'{"business_date": "2025-01-02"}'])  # some fetches later
        await until(lambda: _a_date_is_closed(topology), "the business date")
        assert await topology.pool.fetchval(written) == before, "an idle partition is not written"
        assert not await topology.pool.fetchval("select true from market_prices where price_date > date '2170-01-01'")
        await send(topology.settings, "prices", [price(kept + 1)])
        await until(lambda: _stored_is(topology, kept + 2), "a record behind the hole")


async def _a_date_is_closed(topology: Topology) -> bool:
    return bool(await topology.pool.fetchval("select count(*) from business_dates"))


async def _stored_is(topology: Topology, count: int) -> bool:
    return bool(await topology.pool.fetchval("select count(*) from market_prices") == count)


async def test_holes_that_compaction_leaves_are_passed(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder, input_partitions=1)
    topic = settings.topic("prices")
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=_HURRIED)])
    await admin.close()
    await ensure_topics(settings)
    for first in range(0, 400, 40):  # a segment at least for each send
        await send(settings, "prices", [price(first + n) for n in range(40)], lambda n: b"kept%d" % (n % 7))
        await asyncio.sleep(0.15)
    offsets: list[int] = []

    async def has_holes() -> bool:
        offsets[:] = await _offsets(settings, topic)
        return len(offsets) < 100

    await until(has_holes, "compaction")
    stack = Stack(settings, roles=["intake"])
    await stack.start()
    try:

        async def all_passed() -> bool:
            return await next_offset(settings.dsn, topic) == 400

        await until(all_passed, "the end of the log")
        left = set(await _offsets(settings, topic))  # compaction may have gone on
        assert len(left) <= await stored(settings.dsn) <= len(offsets)
        assert stack.restarts == 0
    finally:
        await stack.stop()


async def _offsets(settings: Settings, topic: str) -> list[int]:
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.bootstrap_servers, auto_offset_reset="earliest")
    partition = TopicPartition(topic, 0)
    await consumer.start()
    try:
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        found: list[int] = []
        while await consumer.position(partition) < end:
            found += [r.offset for r in (await consumer.getmany(timeout_ms=500)).get(partition, [])]
        return found
    finally:
        await consumer.stop()


async def test_a_fetch_that_went_astray_is_fetched_again(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder, batch_records=50)
    stack = Stack(settings, roles=["intake"], program=[sys.executable, "-m", "tests.chaos.sabotage", "lose_fetches"])
    await stack.start()
    try:
        await send(settings, "prices", [price(n) for n in range(1_000)])

        async def all_stored() -> bool:
            return await stored(settings.dsn) == 1_000

        await until(all_stored, "all records")
        assert "went astray" in (settings.data_dir / "logs" / "intake.log").read_text()
        assert stack.restarts == 0
    finally:
        await stack.stop()


_FOLLOW = """
create table steps (step bigint generated always as identity, partition int, next_offset bigint);
create function follow() returns trigger language plpgsql as $$
    begin
        insert into steps (partition, next_offset) values (new.partition, new.next_offset);
        return null;
    end $$;
create trigger follow after update of next_offset on kafka_offsets for each row execute function follow()
"""


async def test_partitions_with_a_backlog_take_turns(kafka: str, empty_database: str, folder: Path) -> None:
    """The client gives all that it is asked for from one partition that has enough; each is asked for a batch."""
    partitions, batches, size = 4, 40, 50
    settings = settings_for(kafka, empty_database, folder, input_partitions=partitions, batch_records=size)
    await ensure_topics(settings)
    await migrate(settings.dsn)
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    try:
        for number in range(partitions * batches * size):
            await producer.send(settings.topic("prices"), price(number % 1_000), partition=number % partitions)
    finally:
        await producer.stop()
    connection = await connect(settings.dsn)
    await connection.execute(_FOLLOW)
    stack = Stack(settings, roles=["intake"])
    await stack.start()
    try:

        async def all_passed() -> bool:
            sum_ = "select sum(next_offset) from kafka_offsets where topic = $1"
            return bool(await connection.fetchval(sum_, settings.topic("prices")) == partitions * batches * size)

        await until(all_passed, "the end of the log")
        steps = await connection.fetch("select partition, next_offset from steps order by step")
    finally:
        await stack.stop()
        await connection.close()
    reached = dict.fromkeys(range(partitions), 0)
    for step in steps:
        reached[step["partition"]] = step["next_offset"]
        left = [offset for offset in reached.values() if offset < batches * size]
        assert max(reached.values()) - min(left, default=batches * size) <= batches * size / 2, reached


@pytest.mark.parametrize("how", ["truncated", "recreated"])
async def test_a_log_without_the_stored_offset_is_refused(
    kafka: str, empty_database: str, folder: Path, how: str
) -> None:
    settings = settings_for(kafka, empty_database, folder, input_partitions=1)
    topic = settings.topic("prices")
    await migrate(settings.dsn)
    await ensure_topics(settings)
    await _set_offset(settings, topic, 5)
    await send(settings, "prices", [price(n) for n in range(10 if how == "truncated" else 3)])
    if how == "truncated":
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
        await admin.start()
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(7)})
        await admin.close()
    output = await worker_that_ends(settings)
    assert "the stored offset 5 is outside the log" in output
    assert await stored(settings.dsn) == 0
    assert await next_offset(settings.dsn, topic) == 5


async def test_records_removed_under_a_running_worker_stop_it(kafka: str, empty_database: str, folder: Path) -> None:
    """The worker is held up by a lock while retention removes what it was to read next."""
    settings = settings_for(kafka, empty_database, folder, input_partitions=1, batch_records=10)
    topic = settings.topic("prices")
    await migrate(settings.dsn)
    await ensure_topics(settings)
    blocker, observer = await connect(settings.dsn), await connect(settings.dsn)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        await blocker.execute("begin; lock table market_prices in access exclusive mode")
        running = asyncio.create_task(worker_that_ends(settings))
        await send(settings, "prices", [price(0)])
        await until(lambda: _somebody_waits(observer), "the worker's first transaction")
        big = 60  # enough that the client cannot have it all in its buffer
        await send(settings, "prices", [price(n, note="x" * 900_000) for n in range(1, big)])
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(big - 2)})
        await blocker.execute("rollback")
        output = await running
        assert "is outside the log" in output
        assert await next_offset(settings.dsn, topic) < big - 2
    finally:
        await admin.close()
        await blocker.close()
        await observer.close()


async def _somebody_waits(connection: asyncpg.Connection) -> bool:
    return bool(
        await connection.fetchval(
            "select true from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' limit 1"
        )
    )


async def _set_offset(settings: Settings, topic: str, offset: int) -> None:
    await open_gate(settings.dsn)
    connection = await connect(settings.dsn)
    try:
        await connection.execute(
            "insert into kafka_offsets values ($1, $2, 0, $3, 1)", settings.group("intake"), topic, offset
        )
    finally:
        await connection.close()


async def test_a_bug_while_the_batch_before_is_committed_ends_the_worker(
    kafka: str, empty_database: str, folder: Path
) -> None:
    settings = settings_for(kafka, empty_database, folder, input_partitions=1, batch_records=10)
    await migrate(settings.dsn)
    await ensure_topics(settings)
    await send(settings, "prices", [price(n, price=8 if n != 25 else 7) for n in range(40)])
    output = await worker_that_ends(settings, ("-m", "tests.chaos.sabotage", "bug_in_decoder"))
    assert "AssertionError: a bug" in output
    assert await next_offset(settings.dsn, settings.topic("prices")) == await stored(settings.dsn) <= 25


async def test_kafkas_committed_offset_follows(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(kafka, empty_database, folder, roles=["intake"], input_partitions=1) as topology:
        await send(topology.settings, "prices", [price(n) for n in range(100)])
        admin = AIOKafkaAdminClient(bootstrap_servers=topology.settings.bootstrap_servers)
        await admin.start()
        partition = TopicPartition(topology.settings.topic("prices"), 0)

        async def follows() -> bool:
            found = await admin.list_consumer_group_offsets(topology.settings.group("intake"))
            return partition in found and found[partition].offset == 100

        try:
            await until(follows, "the committed offset")
        finally:
            await admin.close()
