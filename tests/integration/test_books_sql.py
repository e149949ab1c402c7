"""Prices, transactions, dates, jobs and valuations interleaved at will: the books equal the oracle's."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest

from sinks import calendar, corrections, positions, resets
from sinks.database import connect
from sinks.model import Job
from sinks.valuation import Pass
from streams import records
from tests import scenarios
from tests.engine import Engine
from tidemark.audit import audit_books


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    engine = await Engine.on(database)
    yield engine
    await engine.pool.close()


def dates(*days: int) -> list[dict[str, Any]]:
    return [{"business_date": f"2025-01-{day:02}"} for day in days]


def price(day: int, value: object, security: str = "S", **more: Any) -> dict[str, Any]:
    return {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value, **more}


def trade(id_: str, kind: str, quantity: int, at: float, day: int, portfolio: str = "P", **more: Any) -> dict[str, Any]:
    return {
        "transaction_id": id_, "portfolio_id": portfolio, "security_id": more.pop("security", "S"),
        "transaction_date": f"2025-01-{day:02}T10:00:00Z", "transaction_type": kind, "quantity": quantity, "price": at,
        "gross_transaction_amount": str(Decimal(quantity) * Decimal(str(at))), **more,
    }  # fmt: skip


async def snapshots(engine: Engine, portfolio: str = "P") -> dict[int, tuple[Any, ...]]:
    rows = await engine.pool.fetch(
        """
        select valuation_date, quantity, price, market_value, unrealized_gain_loss, valuation_status
        from daily_position_snapshots where portfolio_id = $1 order by 1
        """,
        portfolio,
    )
    return {row[0].day: tuple(row)[1:] for row in rows}


async def assert_right(engine: Engine, database: str, **context: object) -> None:
    audit = await audit_books(database, engine.method)
    assert audit.differences == [], context
    assert audit.waiting == [], context
    assert audit.snapshots > 0
    assert await engine.pool.fetchval("select count(*) from corrections where right_at is null") == 0, context
    assert engine.table == {}, context
    open_jobs = await engine.pool.fetchval("select count(*) from reprocessing_jobs where status <> 'COMPLETE'")
    assert open_jobs == 0, context


async def test_a_position_valued_unvalued_stale_and_closed(engine: Engine, database: str) -> None:
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1), trade("b", "SELL", 10, 120, 4)])
    await engine.take("prices", [price(2, 110), price(4, 120)])
    await engine.take("business-dates", dates(1, 2, 3, 4, 5))
    await engine.drain()
    assert await snapshots(engine) == {
        1: (10, None, None, None, "UNVALUED"),
        2: (10, 110, 1_100, 100, "VALUED_CURRENT"),
        3: (10, 110, 1_100, 100, "VALUED_STALE"),
        4: (0, 120, 0, 0, "VALUED_CURRENT"),
    }
    await assert_right(engine, database)


async def test_a_late_price_reaches_every_holder_and_only_those(engine: Engine, database: str) -> None:
    holders = [trade(f"h{n}", "BUY", 10, 100, 1, f"H{n}") for n in range(7)]
    gone = [trade("g1", "BUY", 10, 100, 1, "GONE"), trade("g2", "SELL", 10, 100, 2, "GONE")]
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", holders + gone)
    await engine.take("business-dates", dates(1, 2, 3, 6, 7))
    await engine.drain()
    await engine.take("prices", [price(6, 105)])
    dirty = await engine.pool.fetch("select portfolio_id from dirty_keys order by 1")
    assert [row[0] for row in dirty] == [f"H{n}" for n in range(7)]
    await engine.relay()
    await engine.open_jobs()
    assert [await engine.reset_chunk(3) for _ in range(3)] == [2, 3, 2]  # GONE is scanned first, and left alone
    states = await engine.pool.fetch("select watermark_date, status, count(*) from position_state group by 1, 2")
    assert {tuple(row) for row in states} == {
        (date(2025, 1, 5), "REPROCESSING", 7),
        (date(2025, 1, 7), "CURRENT", 1),
    }
    engine.published.clear()
    await engine.drain()
    assert (await snapshots(engine, "H0"))[7][2] == 1_050
    valuations = [event for topic, event in engine.published if topic == "position-valuations"]
    assert [(v["from_date"], v["to_date"], v["changed"], v["market_value"]) for v in valuations] == [
        ("2025-01-06", "2025-01-07", 2, 1_050)
    ] * 7
    statuses = Counter(event["status"] for topic, event in engine.published if topic == "reprocessing-status")
    assert statuses == {"PENDING": 1, "PROCESSING": 1, "COMPLETE": 1, "BOOKS_RIGHT": 1}
    await assert_right(engine, database)


async def test_a_price_that_changes_nothing_writes_nothing(engine: Engine) -> None:
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    engine.published.clear()
    await engine.take("prices", [price(1, "100.00", revision=2)])
    await engine.take("business-dates", dates(1))
    await engine.drain()
    assert engine.published == []


async def test_a_reset_that_waits_for_a_valuation_is_not_lost(engine: Engine, database: str) -> None:
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("business-dates", dates(3))
    await engine.take("prices", [price(3, 90)])
    await engine.relay()
    await engine.open_jobs()
    async with engine.pool.acquire() as valuing, engine.pool.acquire() as resetting:
        running = valuing.transaction()
        await running.start()  # has read the prices, and will now commit its watermark
        await valuing.execute("update position_state set watermark_date = '2025-01-03'")
        (job,) = engine.running

        async def reset() -> resets.Chunk:
            async with resetting.transaction():
                return await resets.reset_chunk(resetting, job, 10)

        waiting = asyncio.create_task(reset())
        await _waits_for_a_lock(database)
        await running.commit()
        assert (await waiting).keys_reset == 1
    engine.running.clear()
    assert await engine.pool.fetchval("select watermark_date from position_state") == date(2025, 1, 2)
    await engine.drain()
    await assert_right(engine, database)


async def test_a_date_closed_late_reaches_a_key_that_is_just_being_created(engine: Engine, database: str) -> None:
    await engine.take("business-dates", dates(1, 3))
    first = records.decode_transaction(json.dumps(trade("a", "BUY", 10, 100, 1)).encode())
    applied, valued = asyncio.Event(), asyncio.Event()
    async with engine.pool.acquire() as booking, engine.pool.acquire() as closing:

        async def close() -> None:
            async with closing.transaction():
                await calendar.apply(closing, [date(2025, 1, 2)])
                applied.set()
                await valued.wait()

        created = booking.transaction()
        await created.start()
        await positions.apply(booking, [(0, first)], "FIFO")
        late = asyncio.create_task(close())
        await _waits_for_a_lock(database)  # or it would not see the key, which would be valued without the date
        await created.commit()
        await applied.wait()
        assert (await engine.value()).keys == 1  # without the date, which has not been committed
        valued.set()
        await late
    await engine.drain()
    assert list(await snapshots(engine)) == [1, 2, 3]
    await assert_right(engine, database)


async def _waits_for_a_lock(database: str) -> None:
    observer = await connect(database)
    try:
        async with asyncio.timeout(120):
            while not await observer.fetchval("select count(*) from pg_locks where not granted"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await observer.close()


async def test_a_key_that_another_holds_is_neither_valued_nor_forgotten(engine: Engine, database: str) -> None:
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1), trade("b", "BUY", 10, 100, 1, "Q")])
    await engine.take("business-dates", dates(1, 2))
    async with engine.pool.acquire() as other, other.transaction():
        await other.execute("select from position_state where portfolio_id = 'P' for update")
        assert (await engine.value()).keys == 1
        assert (await engine.value()).keys == 0
        assert await engine.pool.fetchval("select valued_through from securities") < date(2025, 1, 2)
    assert (await engine.value()).keys == 1
    await engine.drain()
    assert await engine.pool.fetchval("select valued_through from securities") == date(2025, 1, 2)
    await assert_right(engine, database)


async def test_jobs_come_twice_and_statuses_heal(engine: Engine) -> None:
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("prices", [price(1, 90)])
    await engine.relay()
    job = engine.jobs[0]
    await engine.drain()
    engine.published.clear()
    async with engine.pool.acquire() as connection, connection.transaction():
        (again,) = await resets.open_jobs(connection, [job])
        (unneeded,) = await resets.open_jobs(
            connection, [Job(99, "S", date(2025, 1, 1), 99, datetime.now().astimezone())]
        )
    assert (again.status, unneeded.status) == ("COMPLETE", "COMPLETE")
    await engine.relay()
    assert [event["status"] for _, event in engine.published] == ["COMPLETE", "COMPLETE"]


async def test_steps_of_a_job_may_be_repeated_after_a_commit_in_doubt(engine: Engine, database: str) -> None:
    """The offset does not move with them, so it cannot tell whether they were committed: they must tell themselves."""
    await engine.take("transactions", [trade(f"t{n}", "BUY", 10, 100, 1, f"P{n}") for n in range(4)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("prices", [price(1, 90)])
    await engine.relay()
    job = engine.jobs.popleft()
    async with engine.pool.acquire() as connection:

        async def twice(step: Callable[[], Awaitable[Any]]) -> tuple[Any, Any]:
            outcomes = []
            for _ in range(2):
                try:
                    async with connection.transaction():
                        outcomes.append(await step())
                except resets.JobMoved:
                    outcomes.append(resets.JobMoved)
            return outcomes[0], outcomes[1]

        ((opened,), (again,)) = await twice(lambda: resets.open_jobs(connection, [job]))
        assert opened == again
        chunk, repeated = await twice(lambda: resets.reset_chunk(connection, opened, 2))
        assert (chunk.keys_reset, repeated) == (2, resets.JobMoved)
        last, repeated = await twice(lambda: resets.reset_chunk(connection, chunk.job, 100))
        assert (last.keys_reset, last.job.status, repeated) == (2, "COMPLETE", resets.JobMoved)
        assert await connection.fetchval("select keys_done from reprocessing_jobs") == 4
        await engine.take("prices", [price(2, 80)])
        await engine.relay()
        (failing,) = await resets.open_jobs(connection, [engine.jobs.popleft()])
        await resets.fail(connection, failing, "reason")
        await connection.execute("update corrections set held = false")  # released meanwhile
        await resets.fail(connection, failing, "reason")
        assert not await connection.fetchval("select bool_or(held) from corrections")


async def test_a_lost_trigger_is_issued_again_with_growing_patience(engine: Engine, database: str) -> None:
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("prices", [price(1, 90)])
    await engine.pool.execute("delete from outbox_events")  # the trigger is lost

    assert await engine.reissue() == 0  # not yet
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    assert (await engine.reissue(), await engine.reissue()) == (1, 0)
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    assert await engine.reissue() == 1
    patience = await engine.pool.fetchval("select extract(epoch from reissue_at - clock_timestamp()) from corrections")
    assert 50 < patience < 60
    await engine.drain()
    await assert_right(engine, database)


async def test_corrections_that_wait_do_not_make_a_storm_of_repairs(engine: Engine) -> None:
    """One is overdue after the other, as behind a slow sink: the first repair covers them all."""
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    for value in (90, 91, 92):
        await engine.take("prices", [price(1, value)])
    repairs = 0
    for seq in await engine.pool.fetch("select seq from corrections where reset_at is null order by seq"):
        await engine.pool.execute(
            "update corrections set reissue_at = clock_timestamp() where seq = $1 and reissue_count = 0", seq["seq"]
        )
        async with engine.pool.acquire() as connection, connection.transaction():
            repairs += len(await corrections.reissue(connection, 30))
    assert repairs == 1


@pytest.mark.parametrize("seed", range(6))
async def test_any_interleaving_makes_the_oracles_books(database: str, seed: int) -> None:
    chance = random.Random(seed)
    engine = await Engine.on(database, "FIFO" if seed % 2 else "AVCO", keys=chance.choice([1, 4, 1_000]))
    events = scenarios.generate(seed, events=1_200)
    try:
        while events:
            topic, size = events[0][0], chance.choice([1, 5, 40])
            batch = [record for t, record in events[:size] if t == topic]
            events = [event for event in events[:size] if event[0] != topic] + events[size:]
            await engine.take(topic, batch)
            if chance.random() < 0.7:
                await engine.do_something(chance)
        await engine.drain()
        assert await engine.value() == Pass()
        await assert_right(engine, database, seed=seed)
    finally:
        await engine.pool.close()


async def test_closing_an_earlier_date_does_not_miss_a_key_that_is_being_made(engine: Engine, database: str) -> None:
    await engine.take("business-dates", dates(2, 3))
    async with engine.pool.acquire() as booking:
        running = booking.transaction()
        await running.start()
        batch = [records.decode_transaction(json.dumps(trade("a", "BUY", 10, 100, 1)).encode())]
        await positions.apply(booking, list(enumerate(batch)), "FIFO")
        closing = asyncio.create_task(engine.take("business-dates", dates(1)))
        await _waits_for_a_lock(database)
        await running.commit()
        await closing
    assert await engine.pool.fetchval("select reason from corrections where security_id = 'S'") == "calendar"
    await engine.drain()
    await assert_right(engine, database)
