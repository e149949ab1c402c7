"""The models of the simulation held to the original, on a real Postgres and a real Kafka."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from sinks.database import connect_pool
from tests.conformance import run_both
from tests.engine import Engine
from tests.simulation.engine import ModelEngine
from tests.simulation.kafka import Log
from tests.simulation.postgres import Database, Transaction


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_modelled_sinks_do_what_their_sql_does(database: str, seed: int) -> None:
    keys = (3, 1_000)[seed % 2]
    engine = await Engine.on(database, "FIFO", keys=keys)
    try:
        assert await run_both(engine, ModelEngine(keys), seed, events=150) > 10
    finally:
        await engine.pool.close()


class _Real:
    """A few statements on two rows and an advisory lock, in Postgres."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Any]:
        async with self._pool.acquire() as connection, connection.transaction():
            yield _RealClient(connection)

    async def value(self, row: str) -> int | None:
        found: int | None = await self._pool.fetchval("select value from rows where id = $1", row)
        return found

    async def waits(self) -> bool:
        return bool(await self._pool.fetchval("select count(*) from pg_locks where not granted"))


class _RealClient:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def lower(self, row: str, to: int, *, filtered: bool) -> int:
        where = "and value > $2" if filtered else ""
        tag = await self._connection.execute(f"update rows set value = least(value, $2) where id = $1 {where}", row, to)
        return int(tag.split()[-1])

    async def put(self, row: str, value: int) -> None:
        await self._connection.execute("update rows set value = $2 where id = $1", row, value)

    async def insert(self, row: str, value: int) -> bool:
        sql = "insert into rows values ($1, $2) on conflict do nothing"
        return (await self._connection.execute(sql, row, value)).endswith("1")

    async def skip_locked(self) -> list[str]:
        rows = await self._connection.fetch("select id from rows order by id for update skip locked")
        return [row["id"] for row in rows]

    async def advisory(self, *, shared: bool) -> None:
        await self._connection.execute(f"select pg_advisory_xact_lock{'_shared' if shared else ''}(1)")


class _Model:
    """The same on the model."""

    def __init__(self) -> None:
        self.database = Database()
        self.database.tables["rows"].update(a=5, b=5)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Any]:
        async with self.database.transaction() as tx:
            yield _ModelClient(tx)

    async def value(self, row: str) -> int | None:
        found: int | None = self.database.tables["rows"].get(row)
        return found

    async def waits(self) -> bool:
        return self.database.waiting > 0


async def _drive(work: Coroutine[Any, Any, Any]) -> Any:
    """Run the model's coroutines on a real event loop."""
    while True:
        try:
            waits_for = work.send(None)
        except StopIteration as end:
            return end.value
        await asyncio.sleep(0)
        while waits_for is not None and not waits_for():  # noqa: ASYNC110
            await asyncio.sleep(0)


class _ModelClient:
    def __init__(self, tx: Transaction) -> None:
        self._tx = tx

    async def lower(self, row: str, to: int, *, filtered: bool) -> int:
        def where(key: str, value: int) -> bool:
            return key == row and (value > to or not filtered)

        return len(await _drive(self._tx.update("rows", where, lambda _, value: min(value, to))))

    async def put(self, row: str, value: int) -> None:
        await _drive(self._tx.update("rows", lambda key, _: key == row, lambda *_: value))

    async def insert(self, row: str, value: int) -> bool:
        inserted: bool = await _drive(self._tx.insert("rows", row, value))
        return inserted

    async def skip_locked(self) -> list[str]:
        return [key for key in sorted(self._tx.scan("rows")) if self._tx.try_lock("rows", key)]

    async def advisory(self, *, shared: bool) -> None:
        await _drive(self._tx.lock_advisory("1", shared=shared))


@pytest.fixture(params=["postgres", "model"])
async def rows(request: pytest.FixtureRequest, database: str) -> AsyncIterator[_Real | _Model]:
    """Rows a and b, both 5."""
    if request.param == "model":
        yield _Model()
        return
    pool = await connect_pool(database, size=5)
    await pool.execute("create table rows (id text primary key, value int)")
    await pool.execute("insert into rows values ('a', 5), ('b', 5)")
    yield _Real(pool)
    await pool.close()


async def _until_one_waits(rows: _Real | _Model) -> None:
    async with asyncio.timeout(120):
        while not await rows.waits():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def _lower(rows: _Real | _Model, to: int, *, filtered: bool) -> int:
    async with rows.begin() as client:
        changed: int = await client.lower("a", to, filtered=filtered)
        return changed


async def test_an_update_waits_and_works_on_what_was_committed_meanwhile(rows: _Real | _Model) -> None:
    async with rows.begin() as first:
        await first.put("a", 9)
        waiting = asyncio.create_task(_lower(rows, 7, filtered=False))
        await _until_one_waits(rows)
    assert (await waiting, await rows.value("a")) == (1, 7)


async def test_a_filter_is_asked_before_the_wait_and_again_after_it(rows: _Real | _Model) -> None:
    async with rows.begin() as first:
        await first.put("a", 9)
        assert await _lower(rows, 7, filtered=True) == 0  # it was 5: not waited for, and lost
    assert await rows.value("a") == 9
    async with rows.begin() as first:
        await first.put("a", 3)
        waiting = asyncio.create_task(_lower(rows, 4, filtered=True))
        await _until_one_waits(rows)
    assert (await waiting, await rows.value("a")) == (0, 3)


@pytest.mark.parametrize("commits", [True, False])
async def test_an_insert_waits_for_another_of_the_same_key(rows: _Real | _Model, commits: bool) -> None:
    async def insert() -> bool:
        async with rows.begin() as second:
            inserted: bool = await second.insert("c", 2)
            return inserted

    with suppress(LookupError):
        async with rows.begin() as first:
            assert await first.insert("c", 1)
            waiting = asyncio.create_task(insert())
            await _until_one_waits(rows)
            if not commits:
                raise LookupError("rolled back")
    assert (await waiting, await rows.value("c")) == ((False, 1) if commits else (True, 2))


async def test_locked_rows_are_skipped_and_a_rollback_leaves_nothing(rows: _Real | _Model) -> None:
    with suppress(LookupError):
        async with rows.begin() as first:
            await first.put("a", 9)
            async with rows.begin() as second:
                assert await second.skip_locked() == ["b"]
            raise LookupError("rolled back")
    assert await rows.value("a") == 5
    async with rows.begin() as second:
        assert await second.skip_locked() == ["a", "b"]


async def test_one_of_two_that_wait_for_each_other_is_refused(rows: _Real | _Model) -> None:
    async def cross(first: str, second: str, value: int) -> None:
        async with rows.begin() as client:
            await client.put(first, value)
            await both.wait()
            await client.put(second, value)

    both = asyncio.Barrier(2)
    ended = await asyncio.gather(cross("a", "b", 1), cross("b", "a", 2), return_exceptions=True)
    refused = [error for error in ended if error]
    assert [type(error) for error in refused] == [asyncpg.DeadlockDetectedError]
    survivor = 1 if ended[0] is None else 2
    assert (await rows.value("a"), await rows.value("b")) == (survivor, survivor)


async def test_nobody_overtakes_one_who_waits_for_an_advisory_lock(rows: _Real | _Model) -> None:
    order: list[str] = []

    async def take(name: str, *, shared: bool) -> None:
        async with rows.begin() as client:
            await client.advisory(shared=shared)
            order.append(name)

    async with rows.begin() as first, rows.begin() as beside:
        await first.advisory(shared=True)
        await beside.advisory(shared=True)
        exclusive = asyncio.create_task(take("exclusive", shared=False))
        await _until_one_waits(rows)
        shared = asyncio.create_task(take("shared", shared=True))
        await asyncio.sleep(0.05)
        assert order == []
    await asyncio.gather(exclusive, shared)
    assert order == ["exclusive", "shared"]


async def test_a_modelled_log_reads_as_kafkas_does(kafka: str) -> None:
    topic, log = f"log-{uuid.uuid4().hex[:8]}", Log()
    servers = kafka.removeprefix("kafka://")
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    consumer = AIOKafkaConsumer(bootstrap_servers=servers)
    await asyncio.gather(producer.start(), consumer.start())
    try:
        partition = TopicPartition(topic, 0)
        for number in range(12):
            key, value = f"k{number % 3}".encode(), None if number == 7 else f"{number}".encode()
            sent = await producer.send_and_wait(topic, value, key=key)
            assert sent.offset == log.append(key, value)
        consumer.assign([partition])
        assert (await consumer.end_offsets([partition]))[partition] == log.end
        for start in (0, 5, 11):
            consumer.seek(partition, start)
            read: list[Any] = []
            while len(read) < 12 - start:
                read += (await consumer.getmany(timeout_ms=1_000)).get(partition, [])
            assert [(r.offset, r.key, r.value) for r in read] == [tuple(r) for r in log.read(start, 99)]
    finally:
        await asyncio.gather(producer.stop(), consumer.stop())


def test_compaction_keeps_the_last_record_of_each_key_and_every_offset() -> None:
    log = Log()
    for key, value in [(b"a", 1), (b"b", 2), (b"a", 3), (b"b", None), (b"a", 5)]:
        log.append(key, value)
    log.compact(before=3)
    assert [tuple(r) for r in log.read(0, 9)] == [(3, b"b", None), (4, b"a", 5)]
    assert (log.end, log.read(4, 1)[0].value) == (5, 5)
