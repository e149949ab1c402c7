"""Exactly once: claims, fences and doubtful commits on a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import asyncpg
import pytest

from sinks.batches import Batch, Record
from sinks.database import Connection, Pool, connect_pool
from sinks.offsets import BrokenChain, Claim, Fenced, OffsetOutsideLog, Offsets, Overburdened, Released, Stopping
from tests.topology import until

TP = ("prices", 0)


@dataclass(frozen=True)
class Sent:
    offset: int
    value: bytes | None = b"1"
    key: bytes | None = None


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    opened = await connect_pool(database)
    async with opened.acquire() as connection:
        await connection.execute("create table effects (record bigint, amount numeric(3))")
    yield opened
    await opened.close()


def worker(pool: Pool, stopping: Callable[[], bool] = lambda: False) -> Offsets:
    async def get() -> Pool:
        return pool

    return Offsets(get, "group", stopping)


def batch(claim: Claim, start: int, *offsets: int, value: bytes = b"1") -> Batch:
    return Batch(*TP, claim.epoch, start, [Sent(offset, value) for offset in offsets])


async def effect(connection: Connection, records: Sequence[Record]) -> int:
    for record in records:
        await connection.execute("insert into effects values ($1, $2)", record.offset, int(record.value or b"0"))
    return len(records)


async def refuse(connection: Connection, record: Record, detail: str) -> None:
    await connection.execute("insert into effects values ($1, null)", record.offset)


async def effects(pool: Pool) -> list[int]:
    rows = await pool.fetch("select record from effects order by record, ctid")
    return [row["record"] for row in rows]


async def stored(pool: Pool) -> tuple[int, int]:
    row = await pool.fetchrow("select next_offset, epoch from kafka_offsets")
    return row["next_offset"], row["epoch"]


async def test_a_first_claim_starts_at_the_logs_beginning_and_later_ones_where_it_went_on(pool: Pool) -> None:
    first = worker(pool)
    claim = (await first.claim({TP: 7}))[TP]
    assert claim == Claim(7, 1)
    await first.apply(batch(claim, 7, 7, 9, 12), effect, refuse)  # holes are real: compaction, markers
    assert (await worker(pool).claim({TP: 0}))[TP] == Claim(13, 2)
    assert await effects(pool) == [7, 9, 12]


async def test_a_zombie_is_fenced_and_changes_nothing(pool: Pool) -> None:
    zombie, heir = worker(pool), worker(pool)
    old = (await zombie.claim({TP: 0}))[TP]
    new = (await heir.claim({TP: 0}))[TP]
    with pytest.raises(Fenced):
        await zombie.apply(batch(old, 0, 0, 1), effect, refuse)
    await heir.apply(batch(new, 0, 0, 1), effect, refuse)
    with pytest.raises(Fenced):
        await zombie.apply(batch(old, 0, 0, 1), effect, refuse)
    assert await effects(pool) == [0, 1]
    assert await stored(pool) == (2, 2)


async def test_a_batch_of_an_older_claim_is_dropped(pool: Pool) -> None:
    one = worker(pool)
    old = (await one.claim({TP: 0}))[TP]
    await one.claim({TP: 0})
    with pytest.raises(Fenced):
        await one.apply(batch(old, 0, 0), effect, refuse)


async def test_a_claim_given_up_ends_batches_in_hand_and_retries(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]

    async def given_up(connection: Connection, records: Sequence[Record]) -> int:
        one.release()
        raise ConnectionResetError

    with pytest.raises(Released):
        await one.apply(batch(claim, 0, 0), given_up, refuse)
    with pytest.raises(Released):
        await one.apply(batch(claim, 0, 0), effect, refuse)
    again = (await one.claim({TP: 0}))[TP]
    await one.apply(batch(again, 0, 0), effect, refuse)
    assert await effects(pool) == [0]


async def test_records_already_applied_are_skipped(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    await one.apply(batch(claim, 0, 0, 1, 2), effect, refuse)
    await one.apply(batch(claim, 0, 0, 1, 2, 3), effect, refuse)
    assert await one.apply(batch(claim, 0, 0, 1), effect, refuse) == []
    assert await effects(pool) == [0, 1, 2, 3]


async def test_a_missing_batch_stops_the_worker(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    with pytest.raises(BrokenChain):
        await one.apply(batch(claim, 5, 5), effect, refuse)
    assert await effects(pool) == []


@pytest.mark.parametrize(("log_start", "log_end"), [(6, 100), (0, 4)])
async def test_a_stored_offset_outside_the_log_is_refused(pool: Pool, log_start: int, log_end: int) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    await one.apply(batch(claim, 0, 0, 1, 2, 3, 4), effect, refuse)
    again = (await one.claim({TP: log_start}))[TP]
    with pytest.raises(OffsetOutsideLog, match="stored offset 5"):
        one.check(TP, again.next_offset, log_start, log_end)


async def test_a_value_that_postgres_refuses_is_isolated_and_the_rest_goes_on(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    records = [Sent(n, b"99999" if n in (3, 6) else b"1") for n in range(8)]
    await one.apply(Batch(*TP, claim.epoch, 0, records), effect, refuse)
    assert await effects(pool) == list(range(8))
    assert await pool.fetchval("select array_agg(record order by record) from effects where amount is null") == [3, 6]
    assert (await stored(pool))[0] == 8


async def test_halves_follow_on_each_other_over_a_hole_in_the_log(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    records = [Sent(2), Sent(5), Sent(11, b"99999"), Sent(20)]
    await one.apply(Batch(*TP, claim.epoch, 0, records), effect, refuse)
    assert await effects(pool) == [2, 5, 11, 20]
    assert await stored(pool) == (21, 1)


async def test_a_bug_leaves_effect_and_offset_untouched(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]

    async def buggy(connection: Connection, records: Sequence[Record]) -> int:
        await effect(connection, records)
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await one.apply(batch(claim, 0, 0), buggy, refuse)
    assert await effects(pool) == []
    assert await stored(pool) == (0, 1)


def failing_once(inner: Callable[..., Awaitable[int]], error: Exception) -> Callable[..., Awaitable[int]]:
    calls = 0

    async def effect_once(connection: Connection, records: Sequence[Record]) -> int:
        nonlocal calls
        calls += 1
        done = await inner(connection, records)
        if calls == 1:
            raise error
        return done

    return effect_once


async def test_a_transient_error_is_retried_in_place(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    await one.apply(batch(claim, 0, 0, 1), failing_once(effect, asyncpg.DeadlockDetectedError("x")), refuse)
    assert await effects(pool) == [0, 1]


async def test_a_transient_error_at_shutdown_leaves_everything_as_it_was(pool: Pool) -> None:
    one = worker(pool, stopping=lambda: True)
    claim = (await one.claim({TP: 0}))[TP]
    with pytest.raises(Stopping):
        await one.apply(batch(claim, 0, 0), failing_once(effect, ConnectionResetError()), refuse)
    assert await effects(pool) == []


class LostAcknowledgement:
    """A pool whose first transaction commits, or not, and then loses the connection before the client hears."""

    def __init__(self, pool: Pool, committed: bool) -> None:
        self._pool, self._committed, self._armed = pool, committed, False

    def arm(self) -> None:
        self._armed = True

    def acquire(self) -> object:
        return _Acquired(self._pool, self) if self._armed else self._pool.acquire()

    def disarm(self) -> bool:
        self._armed = False
        return self._committed


class _Acquired:
    def __init__(self, pool: Pool, fault: LostAcknowledgement) -> None:
        self._context, self._fault = pool.acquire(), fault

    async def __aenter__(self) -> object:
        return _Connection(await self._context.__aenter__(), self._fault)

    async def __aexit__(self, *error: object) -> None:
        await self._context.__aexit__(*error)


class _Connection:
    def __init__(self, connection: Connection, fault: LostAcknowledgement) -> None:
        self._connection, self._fault = connection, fault

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)

    def transaction(self) -> object:
        return _Transaction(self._connection.transaction(), self._fault)


class _Transaction:
    def __init__(self, transaction: asyncpg.transaction.Transaction, fault: LostAcknowledgement) -> None:
        self._transaction, self._fault = transaction, fault

    async def __aenter__(self) -> None:
        await self._transaction.start()

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None and self._fault.disarm():
            await self._transaction.commit()
        else:
            await self._transaction.rollback()
        if kind is None:
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


@pytest.mark.parametrize("committed", [True, False])
async def test_an_ambiguous_commit_is_read_back_before_it_is_repeated(pool: Pool, committed: bool) -> None:
    fault = LostAcknowledgement(pool, committed)
    one = worker(fault)  # type: ignore[arg-type]
    claim = (await one.claim({TP: 0}))[TP]
    fault.arm()
    assert await one.apply(batch(claim, 0, 0, 1), effect, refuse) == [2]
    assert await effects(pool) == [0, 1], "exactly once, whether the lost COMMIT had happened or not"
    await one.apply(batch(claim, 2, 2), effect, refuse)
    assert await stored(pool) == (3, 1)


async def test_an_ambiguous_commit_followed_by_another_claim_is_fenced(pool: Pool) -> None:
    fault = LostAcknowledgement(pool, committed=False)
    one, heir = worker(fault), worker(pool)  # type: ignore[arg-type]
    claim = (await one.claim({TP: 0}))[TP]
    fault.arm()

    async def overtaken(connection: Connection, records: Sequence[Record]) -> int:
        return await effect(connection, records)

    original = one._back_off

    async def back_off(delay: float) -> float:
        await heir.claim({TP: 0})
        return await original(delay)

    one._back_off = back_off  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        await one.apply(batch(claim, 0, 0), overtaken, refuse)
    assert await effects(pool) == []


async def test_a_bug_in_a_statement_is_not_taken_for_a_lost_connection(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]

    async def buggy(connection: Connection, records: Sequence[Record]) -> int:
        await connection.execute("insert into effects values ($1, null)", 1, 2)
        return 0

    with pytest.raises(asyncpg.InterfaceError, match="expects 1 argument"):
        await one.apply(batch(claim, 0, 0), buggy, refuse)
    assert await stored(pool) == (0, 1)


async def test_sessions_that_a_failover_left_read_only_are_given_up(
    pool: Pool, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A session keeps what it was opened with: one opened while the database was read-only can never write."""
    name = database.rsplit("/", 1)[1]
    await pool.execute(f"alter database {name} set default_transaction_read_only = on")
    after = await connect_pool(database)
    try:
        one = worker(after)
        claiming = asyncio.create_task(one.claim({TP: 0}))
        await until(lambda: _warned(caplog, "cannot write"), "the first attempt")
        await pool.execute(f"alter database {name} reset default_transaction_read_only")
        claim = (await claiming)[TP]
        await one.apply(batch(claim, 0, 0, 1), effect, refuse)
        assert await effects(pool) == [0, 1]
    finally:
        await after.close()


async def _warned(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def test_claims_that_come_to_nothing_are_counted(pool: Pool) -> None:
    async def barren(end: int = 10) -> int:
        return (await worker(pool).claim({TP: 0}, {TP: end}))[TP].barren

    assert [await barren() for _ in range(3)] == [0, 1, 2]
    assert await barren(end=0) == 2, "there was nothing to read"
    orderly = worker(pool)
    await orderly.claim({TP: 0}, {TP: 10})
    orderly.release()
    await orderly.hand_over()
    assert await barren() == 3, "its owner gave it up in order"
    fruitful = worker(pool)
    claim = (await fruitful.claim({TP: 0}, {TP: 10}))[TP]
    assert claim.barren == 4
    assert (await fruitful.claim({TP: 0}, {TP: 10}))[TP].barren == 4, "the same process, which is alive"
    claim = fruitful.held(TP) or claim
    await fruitful.apply(batch(claim, 0, 0), effect, refuse)
    assert await barren() == 0


async def test_a_batch_without_records_passes_a_hole(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    await one.apply(replace(batch(claim, 0, 0, 1), end=4), effect, refuse)
    assert await stored(pool) == (4, 1)
    await one.apply(Batch(*TP, claim.epoch, 4, [], 9), effect, refuse)
    assert await stored(pool) == (9, 1)
    assert await effects(pool) == [0, 1]


async def test_a_batch_that_exceeds_a_limit_is_too_much_and_one_record_is_after_some_tries(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    tries = 0

    async def slow(connection: Connection, records: Sequence[Record]) -> int:
        nonlocal tries
        tries += 1
        await connection.execute("set local statement_timeout = '20ms'")
        await connection.execute("select pg_sleep(5) where $1", any(r.offset == 3 for r in records) or len(records) > 2)
        await connection.execute("set local statement_timeout = 0")
        return await effect(connection, records)

    with pytest.raises(Overburdened, match="statement timeout"):
        await one.apply(batch(claim, 0, 0, 1, 2), slow, refuse)
    assert tries == 1
    await one.apply(batch(claim, 0, 0, 1), slow, refuse)
    await one.apply(batch(claim, 2, 2), slow, refuse)
    tries = 0
    with pytest.raises(Overburdened):
        await one.apply(batch(claim, 3, 3), slow, refuse)
    assert tries == one.patience
    assert await effects(pool) == [0, 1, 2]


async def test_what_was_committed_before_a_half_was_too_much_is_told(pool: Pool) -> None:
    """A value that Postgres refuses halves the batch; then one of the halves exceeds a limit."""
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]

    async def slow_behind(connection: Connection, records: Sequence[Record]) -> int:
        done = await effect(connection, records)
        if records[0].offset == 2:
            raise asyncpg.QueryCanceledError("statement timeout")
        return done

    records = [Sent(0), Sent(1), Sent(2), Sent(3, b"99999")]
    with pytest.raises(Overburdened) as stopped:
        await one.apply(Batch(*TP, claim.epoch, 0, records[:3] + records[3:]), slow_behind, refuse)
    assert stopped.value.done == [2]
    assert await stored(pool) == (2, 1)


async def test_a_rehearsal_changes_nothing(pool: Pool) -> None:
    one = worker(pool)
    claim = (await one.claim({TP: 0}))[TP]
    await one.rehearse(batch(claim, 5, 5), lambda c: effect(c, [Sent(5)]))
    assert await effects(pool) == []
    assert await stored(pool) == (0, 1)
