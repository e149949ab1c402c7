"""The gate on a real Postgres, and what a new generation writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from typing import Any

import asyncpg
import pytest

from sinks import generation, outbox, reannounce
from sinks.database import is_transient
from sinks.failures import Failure, failure_of, is_too_much
from sinks.generation import Mark
from sinks.offsets import Offsets
from sinks.reannounce import EPOCHS_BITS, Published, Seen
from tests.engine import Engine
from tests.processed import Downstream

LOST = Mark(fence=0, round=50, generation=0, event_id=7_000, seq=300)
FIRST = 1 << EPOCHS_BITS

DRAWING = [
    "insert into outbox_events (topic) values ('x')",
    "insert into corrections (seq, security_id, earliest_date, reason) values (1, 'A', '2025-01-01', 'x')",
    "insert into kafka_offsets values ('g', 't', 0, 0, 1)",
    "update kafka_offsets set next_offset = next_offset + 1",
    "insert into outbox_events (topic) select 'x' where false",  # what may draw waits, whether it does or not
]


def trade(n: int, day: int, portfolio: str = "P") -> dict[str, Any]:
    return {
        "transaction_id": f"t{n}", "portfolio_id": portfolio, "security_id": "A", "transaction_type": "BUY",
        "transaction_date": f"2025-01-{day:02}T10:00:00Z", "quantity": 1, "price": 10,
    }  # fmt: skip


async def close_gate(pool: asyncpg.Pool) -> None:
    """As a copy of the database finds it on another server."""
    await pool.execute("update installation set instance = 'of another server'")


@pytest.mark.parametrize("statement", DRAWING)
async def test_no_number_is_drawn_and_no_offset_moves_before_the_server_is_confirmed(
    pool: asyncpg.Pool, statement: str
) -> None:
    await close_gate(pool)
    with pytest.raises(asyncpg.CannotConnectNowError) as refused:
        await pool.execute(statement)
    assert generation.is_closed_gate(refused.value)
    await pool.execute("update position_state set epoch = epoch")  # anything else
    async with pool.acquire() as connection:
        await generation.open_gate(connection, 1)
    await pool.execute(statement)


async def test_the_gate_is_waited_out_and_condemns_nothing(pool: asyncpg.Pool) -> None:
    await close_gate(pool)
    with pytest.raises(asyncpg.CannotConnectNowError) as refused:
        await pool.execute(DRAWING[0])
    assert is_transient(refused.value)
    for in_effect in (True, False):
        failure = failure_of(refused.value, in_effect)
        assert failure is Failure.WAIT
        assert not is_too_much(failure, in_a_row=1_000, records=1, patience=5)


async def test_a_claim_waits_at_the_gate(pool: asyncpg.Pool) -> None:
    await close_gate(pool)
    asked = 0

    async def opened_at_the_third_try() -> asyncpg.Pool:
        nonlocal asked
        asked += 1
        if asked == 3:
            async with pool.acquire() as connection:
                await generation.open_gate(connection, 1)
        return pool

    claims = await Offsets(opened_at_the_third_try, "g", lambda: False).claim({("t", 0): 5})
    assert (asked, claims["t", 0].next_offset) == (3, 5)


async def test_a_copy_and_a_table_loaded_anew_are_other_instances(pool: asyncpg.Pool) -> None:
    before = await pool.fetchval("select this_instance()")
    await pool.execute("truncate installation")
    await pool.execute("insert into installation (instance) values ($1)", before)
    assert await pool.fetchval("select this_instance()") != before
    with pytest.raises(asyncpg.CannotConnectNowError):
        await pool.execute(DRAWING[0])


async def test_rounds_are_counted_behind_the_gate_only(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("insert into outbox_events (topic) values ('x'), ('x')")
        first = await generation.begin_round(connection, {"x/0": 4})
        second = await generation.begin_round(connection)
        here = await generation.read(connection)
        assert (first.round, first.event_id, second.round) == (1, 2, 2)
        assert (here.place, here.positions) == ((0, 2), {"x/0": 4})
        await close_gate(pool)
        with pytest.raises(asyncpg.CannotConnectNowError):
            await generation.begin_round(connection)


async def history(engine: Engine) -> list[tuple[str, bytes, dict[str, Any], int]]:
    """Everything that waits in the outbox: (topic, key, event, id)."""
    async with engine.pool.acquire() as connection:
        events = (await outbox.read(connection, 100_000, 2**30)).events
        await outbox.acknowledge(connection, events)
    return [(e.topic, e.key or b"", json.loads(e.value or b""), e.id) for e in events]


async def begin(engine: Engine, published: Published) -> int:
    await close_gate(engine.pool)
    async with engine.pool.acquire() as connection:
        here = await generation.read(connection)
        return await reannounce.begin(connection, here, 99, LOST, published)


@pytest.fixture
async def engine(database: str) -> Any:
    """One position of two trades, valued and published."""
    found = await Engine.on(database)
    await found.take("business-dates", [{"business_date": "2025-01-10"}])
    await found.take("prices", [{"security_id": "A", "price_date": "2025-01-01", "price": 4}])
    await found.take("transactions", [trade(1, 3), trade(2, 5)])
    await found.drain()
    yield found
    await found.pool.close()


def of_topic(events: Sequence[tuple[str, bytes, dict[str, Any], int]], topic: str) -> list[dict[str, Any]]:
    return [event for name, _, event, _ in events if name == topic]


async def test_what_consumers_may_have_seen_ahead_is_announced_anew(engine: Engine) -> None:
    seen = Seen()
    seen.add(7)
    seen.add(3, date(2025, 1, 6))
    published = Published({("A", "P"): seen, ("A", "GONE"): Seen(2, date(2025, 1, 4))}, {("A", 250): "COMPLETE"})
    assert await begin(engine, published) == 1
    events = await history(engine)
    processed = of_topic(events, "transactions-processed")
    assert [(e["portfolio_id"], e["epoch"], e["sequence"]) for e in processed] == [
        ("GONE", FIRST, 0), ("P", FIRST, 0), ("P", FIRST, 1), ("P", FIRST, 2),
    ]  # fmt: skip
    assert [e["count"] for e in processed[:2]] == [0, 2]
    valuations = of_topic(events, "position-valuations")
    assert [(e["portfolio_id"], e["from_date"], e["quantity"], e["market_value"]) for e in valuations] == [
        ("GONE", "2025-01-04", 0, None), ("P", "2025-01-06", 2, 8),
    ]  # fmt: skip
    (status,) = of_topic(events, "reprocessing-status")
    assert (status["status"], status["security_id"], status["job_id"]) == ("BOOKS_REOPENED", "A", 250)
    assert min(number for *_, number in events) > LOST.event_id
    await engine.take("prices", [{"security_id": "A", "price_date": "2025-01-02", "price": 5}])
    assert await engine.pool.fetchval("select max(seq) from corrections") > LOST.seq
    row = await engine.pool.fetchrow("select generation, fence, lost_round, keys, jobs from generations")
    assert tuple(row) == (1, 99, LOST.round, 2, 1)


async def test_an_epoch_above_all_others_stays_above_them(engine: Engine) -> None:
    """Also where what was announced is of this generation already, since a loss before it was not seen to its end."""
    await begin(engine, Published({("A", "P"): Seen(FIRST + 5)}))
    assert await engine.pool.fetchval("select epoch from position_state") == FIRST + 6


async def test_claims_of_before_are_fenced_out_and_count_as_given_up(engine: Engine) -> None:
    await engine.pool.execute("insert into kafka_offsets values ('g', 't', 0, 5, 3)")
    await begin(engine, Published())
    row = await engine.pool.fetchrow("select next_offset, epoch, released from kafka_offsets")
    assert row["next_offset"] == 5
    assert row["epoch"] >= 99 << 20
    assert row["released"]


async def test_where_the_log_does_not_reach_back_every_position_is_announced_anew(engine: Engine) -> None:
    """And one that comes into being afterwards begins with a marker: it may have been seen before."""
    await begin(engine, Published(reaches_back=False))
    events = await history(engine)
    assert [(e["epoch"], e["sequence"]) for e in of_topic(events, "transactions-processed")] == [
        (FIRST, 0), (FIRST, 1), (FIRST, 2),
    ]  # fmt: skip
    assert len(of_topic(events, "position-valuations")) == 1
    consumer = Downstream()  # it knows the new position from the future that was lost
    consumer.take(b"Q|A", 1, json.dumps({**trade(8, 3, "Q"), "epoch": 0, "sequence": 1}).encode())
    await engine.take("transactions", [trade(9, 4, "Q")])
    for topic, key, event, number in await history(engine):
        if topic == "transactions-processed":
            consumer.take(key, number, json.dumps(event).encode())
    assert consumer.wrong == []
    assert consumer.keys["Q", "A"].transactions == ["t9"]
    assert consumer.keys["Q", "A"].epoch > FIRST


async def test_a_position_that_was_lost_entirely_goes_on_when_it_is_read_again(engine: Engine) -> None:
    await begin(engine, Published({("A", "GONE"): Seen(2)}))
    assert await engine.pool.fetchval("select count(*) from dirty_keys") == 0
    await engine.take("transactions", [trade(9, 4, "GONE")])
    await engine.drain()
    assert await engine.pool.fetchval("select count(*) from dirty_keys") == 0
    assert await engine.pool.fetchval(
        "select quantity from daily_position_snapshots where portfolio_id = 'GONE' and valuation_date = '2025-01-10'"
    ) == 1  # fmt: skip


async def test_only_statuses_that_the_books_do_not_hold_are_taken_back(engine: Engine) -> None:
    await engine.take("prices", [{"security_id": "A", "price_date": "2025-01-02", "price": 5}])
    right = await engine.pool.fetchval("select max(seq) from corrections")
    await engine.drain()
    await engine.take("prices", [{"security_id": "A", "price_date": "2025-01-03", "price": 6}])
    opened = await engine.pool.fetchval("select max(seq) from corrections")
    announced = {
        right: "BOOKS_RIGHT", opened: "BOOKS_RIGHT", 200: "COMPLETE", 201: "CANCELLED", 202: "BOOKS_REOPENED",
    }  # fmt: skip
    await history(engine)
    await begin(engine, Published(statuses={("A", job_id): status for job_id, status in announced.items()}))
    told = of_topic(await history(engine), "reprocessing-status")
    assert [(e["status"], e["job_id"]) for e in told] == [("BOOKS_REOPENED", opened), ("BOOKS_REOPENED", 200)]
