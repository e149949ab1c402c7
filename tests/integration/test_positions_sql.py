"""The position sink on a real Postgres: examples of semantics.md, and random batches against the oracle."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from sinks import calendar, positions
from sinks.database import connect
from sinks.model import CostBasisMethod, Transaction
from streams.records import decode_transaction
from tests import scenarios
from tidemark.audit import audit_books

JAN = [datetime(2025, 1, day, 10, tzinfo=UTC) for day in range(1, 29)]


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(database)
    yield connection
    await connection.close()


def trade(
    id_: str, kind: str, quantity: int, price: float, day: int, *, portfolio: str = "P", fee: int = 0, **more: Any
) -> Transaction:
    amount = Decimal(quantity) * Decimal(str(price))
    return Transaction(
        id_, portfolio, more.pop("security", "S"), JAN[day - 1], kind, Decimal(quantity), Decimal(str(price)), amount,
        Decimal(fee), **more,
    )  # fmt: skip


async def book(
    connection: asyncpg.Connection, *batch: Transaction, method: CostBasisMethod = "FIFO"
) -> positions.PositionOutcome:
    async with connection.transaction():
        return await positions.apply(connection, list(enumerate(batch)), method)


async def close(connection: asyncpg.Connection, *days: int) -> None:
    async with connection.transaction():
        await calendar.apply(connection, [date(2025, 1, day) for day in days])


async def value_all(connection: asyncpg.Connection) -> None:
    """As a valuation leaves the keys, without its snapshots."""
    await connection.execute(
        """
        update position_state set watermark_date = latest, status = 'CURRENT', reset_seq = null
        from (select max(business_date) as latest from business_dates) as closed where watermark_date < latest
        """
    )
    await connection.execute(
        "update securities set valued_through = closed.latest from ("
        "select max(business_date) as latest from business_dates) as closed where latest is not null"
    )


async def last(connection: asyncpg.Connection, portfolio: str = "P") -> tuple[Decimal, Decimal, Decimal]:
    row = await connection.fetchrow(
        """
        select quantity, cost_basis, realized_gain_loss from position_history
        where portfolio_id = $1 and superseded_epoch is null order by sequence desc limit 1
        """,
        portfolio,
    )
    return tuple(row)


async def state(connection: asyncpg.Connection, portfolio: str = "P", security: str = "S") -> tuple[int, date, str]:
    return tuple(
        await connection.fetchrow(
            "select epoch, watermark_date, status from position_state where portfolio_id = $1 and security_id = $2",
            portfolio, security,
        )
    )  # fmt: skip


async def published(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    rows = await connection.fetch("select value from outbox_events where topic = 'transactions-processed' order by id")
    return [json.loads(row["value"]) for row in rows]


async def test_a_late_sell_makes_one_new_epoch(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 200, 1), trade("b", "BUY", 50, 220, 3))
    assert await state(connection) == (0, date(2024, 12, 31), "CURRENT")
    outcome = await book(connection, trade("c", "SELL", 40, 215, 2))
    assert (outcome.rebuilt, outcome.replayed) == (1, 3)
    assert await last(connection) == (110, 23_000, 600)
    assert (await state(connection))[0] == 1


@pytest.mark.parametrize("one_batch", [True, False])
async def test_a_burst_in_one_batch_costs_one_epoch(connection: asyncpg.Connection, one_batch: bool) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 1), trade("b", "BUY", 50, 12, 4))
    late = [trade("c", "SELL", 20, 11, 2), trade("d", "SELL", 30, 11.5, 3)]
    for batch in [late] if one_batch else [late[:1], late[1:]]:
        await book(connection, *batch)
    assert (await last(connection))[:2] == (100, 1_100)
    assert (await state(connection))[0] == (1 if one_batch else 2)


@pytest.mark.parametrize(("method", "realized"), [("AVCO", 200), ("FIFO", 250)])
async def test_cost_basis_method(connection: asyncpg.Connection, method: CostBasisMethod, realized: int) -> None:
    batch = [trade("a", "BUY", 100, 10, 1), trade("b", "BUY", 100, 12, 2)]
    await book(connection, *batch, method=method)
    await book(connection, trade("c", "SELL", 50, 15, 3), method=method)
    assert (await last(connection))[2] == realized
    assert (await state(connection))[0] == 0


async def test_watermark_status_and_ledger_of_a_rebuild(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6), trade("b", "BUY", 100, 10, 8))
    await close(connection, 6, 7, 8, 9)
    await value_all(connection)
    await book(connection, trade("c", "BUY", 1, 10, 7))
    assert await state(connection) == (1, date(2025, 1, 6), "REPROCESSING")
    row = await connection.fetchrow("select * from corrections")
    assert (row["reason"], row["earliest_date"], row["right_at"]) == ("transaction", date(2025, 1, 7), None)
    assert row["reset_at"] is not None
    assert await connection.fetchval("select reset_seq from position_state") == row["seq"]
    assert await connection.fetchval("select valued_through from securities") == date(2025, 1, 6)


async def test_same_date_append_rearms_the_valuation_without_an_epoch(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6))
    await close(connection, 6, 7)
    await value_all(connection)
    await book(connection, trade("b", "BUY", 100, 10, 7), trade("c", "BUY", 100, 10, 7))
    assert await state(connection) == (0, date(2025, 1, 6), "CURRENT")
    assert await connection.fetchval("select valued_through from securities") == date(2025, 1, 6)
    assert await connection.fetchval("select count(*) from corrections") == 0


async def test_before_the_watermark_is_late_even_after_the_last_transaction(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6))
    await close(connection, 6, 7, 8, 9)
    await value_all(connection)
    await book(connection, trade("b", "BUY", 100, 10, 8))
    assert await state(connection) == (1, date(2025, 1, 7), "REPROCESSING")


async def test_amendment_cancellation_move_and_revival(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6), trade("b", "BUY", 10, 10, 8))
    await book(connection, trade("b", "BUY", 20, 10, 8, revision=1))
    assert await last(connection) == (120, 1_200, 0)
    await book(connection, trade("b", "BUY", 20, 10, 8, revision=2, cancelled=True))
    assert await last(connection) == (100, 1_000, 0)
    assert await state(connection) == (2, date(2025, 1, 5), "CURRENT")
    await book(connection, trade("c", "BUY", 1, 10, 9))  # the tail after a cancellation is the one before it
    assert await last(connection) == (101, 1_010, 0)
    await book(connection, trade("a", "BUY", 100, 10, 6, revision=1, portfolio="Q"))
    assert await last(connection) == (1, 10, 0)
    assert await last(connection, "Q") == (100, 1_000, 0)
    assert ((await state(connection))[0], (await state(connection, "Q"))[0]) == (3, 0)
    await book(connection, trade("c", "BUY", 1, 10, 9, revision=1, cancelled=True))
    marker = (await published(connection))[-1]
    assert (marker["sequence"], marker["count"], marker["epoch"]) == (0, 0, 4)
    await book(connection, trade("c", "BUY", 2, 10, 9, revision=2))
    assert await last(connection) == (2, 20, 0)
    assert (await state(connection))[0] == 4


async def test_duplicates_conflicts_and_lower_revisions(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6, revision=3))
    outcome = await book(
        connection,
        trade("a", "BUY", 100, 10, 6, revision=3),
        trade("a", "BUY", 7, 10, 6, revision=3),
        trade("a", "BUY", 7, 10, 6, revision=2),
        trade("never", "BUY", 1, 1, 6, cancelled=True),
    )
    assert (outcome.ignored, list(outcome.conflicts), outcome.appended, outcome.rebuilt) == (2, [1], 0, 0)
    assert await connection.fetchval("select count(*) from position_state") == 1
    assert len(await published(connection)) == 1


async def test_future_dated_rebuild_leaves_the_key_current(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 6), trade("b", "BUY", 100, 10, 20))
    await close(connection, 6, 7)
    await value_all(connection)
    await book(connection, trade("c", "BUY", 100, 10, 15))
    assert await state(connection) == (1, date(2025, 1, 7), "CURRENT")
    assert await connection.fetchval("select reset_seq from position_state") is None


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_any_batches_make_the_oracles_history(
    connection: asyncpg.Connection, database: str, seed: int
) -> None:
    chance = random.Random(seed)
    method: CostBasisMethod = "FIFO" if seed % 2 else "AVCO"
    events = scenarios.generate(seed, events=1_000)
    chance.shuffle(events)
    arrived = [decode_transaction(json.dumps(r).encode()) for topic, r in events if topic == "transactions"]
    closed = [date.fromisoformat(r["business_date"]) for topic, r in events if topic == "business-dates"]
    while arrived:
        size = chance.choice([1, 3, 20, 100])
        await book(connection, *arrived[:size], method=method)
        del arrived[:size]
        if closed and chance.random() < 0.5:
            async with connection.transaction():
                await calendar.apply(connection, [closed.pop()])
        if chance.random() < 0.3:
            await value_all(connection)
    await connection.execute("delete from business_dates")  # the valuations are not this test's matter
    audit = await audit_books(database, method)
    assert audit.differences == [], f"seed {seed}"
    assert audit.keys > 5
    await _consumer_has_the_live_transactions(connection)


_WRITTEN = (
    "select to_jsonb(h) - 'recorded_at' - 'superseded_at' from position_history h order by 1",
    "select to_jsonb(s) - 'reset_seq', reset_seq is null from position_state s order by 1",
    "select security_id, earliest_date, reason from corrections order by seq",
    "select message_key, convert_from(value, 'UTF8'), replay - 'event_ids' from outbox_events "
    "where topic = 'transactions-processed' order by message_key, id",
)


@pytest.mark.parametrize("rows", [1, 3, 10])
async def test_portions_of_any_size_write_the_same(
    connection: asyncpg.Connection, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is booked twice: in portions of so few rows, which is undone, and in one."""
    chance = random.Random(rows)
    method: CostBasisMethod = "AVCO" if rows == 3 else "FIFO"
    arrived = [
        decode_transaction(json.dumps(r).encode()) for t, r in scenarios.generate(rows, events=400) if t[0] == "t"
    ]
    chance.shuffle(arrived)
    parts: list[int] = []
    whole = positions._book

    async def counted(connection: Any, portion: Any, *rest: Any) -> Any:
        parts.append(len(portion))
        return await whole(connection, portion, *rest)

    async def booked(batch: list[Transaction], size: int) -> tuple[list[Any], positions.PositionOutcome]:
        monkeypatch.setattr(positions, "_PORTION_ROWS", size)
        outcome = await positions.apply(connection, list(enumerate(batch)), method, 30)
        return [await connection.fetch(query) for query in _WRITTEN], outcome

    monkeypatch.setattr(positions, "_book", counted)
    cut = 0
    await close(connection, 6)
    while arrived:
        size = chance.choice([1, 5, 20])
        batch, arrived = arrived[:size], arrived[size:]
        async with connection.transaction():
            undone = connection.transaction()
            await undone.start()
            in_portions, outcome = await booked(batch, rows)
            cut += len(parts) > 1
            await undone.rollback()
            parts.clear()
            at_once, expected = await booked(batch, 10**6)
            assert len(parts) <= 1
            parts.clear()
        assert in_portions == at_once
        for name in ("ignored", "conflicts", "appended", "rebuilt", "replayed"):
            assert getattr(outcome, name) == getattr(expected, name)
    assert cut > 5


async def test_a_history_with_more_transactions_than_rows_is_rebuilt_in_parts(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the history says little of how many transactions there are: reckoned, it would be two."""
    batch = [trade(f"t{n:02}", "BUY" if n % 3 else "SELL", 1 + n % 5, 10, 1 + n) for n in range(20)]
    await book(connection, *batch)
    expected = await last(connection)
    await connection.execute("delete from position_history where sequence > 1")
    outcome = await book(
        connection, trade("t01", "BUY", 2, 11, 2, revision=1), trade("t01", "BUY", 2, 10, 2, revision=2)
    )
    assert outcome.replayed == 20
    assert await last(connection) == expected


async def _consumer_has_the_live_transactions(connection: asyncpg.Connection) -> None:
    """A consumer that keeps per key only the highest epoch has exactly the key's live transactions, in order."""
    kept: dict[tuple[str, str], tuple[int, list[str]]] = defaultdict(lambda: (0, []))
    for event in await published(connection):
        key, epoch = (event["portfolio_id"], event["security_id"]), event["epoch"]
        if event["sequence"] == 0:
            assert epoch == kept[key][0] + 1
            kept[key] = (epoch, [])
        else:
            assert (epoch, event["sequence"]) == (kept[key][0], len(kept[key][1]) + 1)
            kept[key][1].append(event["transaction_id"])
    live: dict[tuple[str, str], tuple[int, list[str]]] = {
        (row["portfolio_id"], row["security_id"]): (row["epoch"], [])
        for row in await connection.fetch("select * from position_state")
    }
    rows = await connection.fetch("select * from position_history where superseded_epoch is null order by sequence")
    for row in rows:
        live[row["portfolio_id"], row["security_id"]][1].append(row["transaction_id"])
    assert dict(kept) == live
