"""The price and calendar sinks on a real Postgres."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import date
from decimal import Decimal

import pytest

from sinks import calendar, prices
from sinks.database import Connection, connect
from sinks.model import Price

D1, D2, D3 = date(2025, 9, 1), date(2025, 9, 2), date(2025, 9, 3)


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Connection]:
    opened = await connect(database)
    yield opened
    await opened.close()


async def store(connection: Connection, *batch: Price) -> prices.PriceOutcome:
    async with connection.transaction():
        return await prices.apply(connection, batch)


async def close(connection: Connection, *days: date) -> calendar.CalendarOutcome:
    async with connection.transaction():
        return await calendar.apply(connection, days)


def quote(day: date, price: str, revision: int = 0, security: str = "S1") -> Price:
    return Price(security, day, Decimal(price), "USD", revision)


async def ledger(connection: Connection) -> list[tuple[str, date, str]]:
    rows = await connection.fetch("select security_id, earliest_date, reason from corrections order by seq")
    return [tuple(row) for row in rows]


async def test_a_price_after_the_latest_closed_date_is_not_late(connection: Connection) -> None:
    await close(connection, D1)
    assert (await store(connection, quote(D2, "10"))).corrections == {}


async def test_the_price_for_the_latest_date_itself_is_late_once_it_closed(connection: Connection) -> None:
    await close(connection, D1)
    assert (await store(connection, quote(D1, "10"))).corrections.keys() == {"S1"}


async def test_one_correction_per_security_and_batch_from_the_earliest_changed_date(connection: Connection) -> None:
    await close(connection, D1, D2, D3)
    await store(connection, quote(D3, "1"), quote(D2, "2"), quote(D1, "3", security="S2"))
    assert sorted(await ledger(connection)) == [("S1", D2, "price"), ("S2", D1, "price")]


async def test_the_same_value_under_a_higher_revision_is_stored_but_not_late(connection: Connection) -> None:
    await store(connection, quote(D1, "10"))
    await close(connection, D1)
    assert (await store(connection, quote(D1, "10.0", revision=2))).corrections == {}
    assert (await store(connection, quote(D1, "11", revision=1))) == prices.PriceOutcome(0, 1)
    assert await connection.fetchval("select revision from market_prices") == 2


async def test_of_equal_revisions_the_later_wins_and_higher_ones_beat_later_ones(connection: Connection) -> None:
    await store(connection, quote(D1, "3", revision=1), quote(D1, "4", revision=1), quote(D1, "5"))
    assert await connection.fetchval("select price from market_prices") == 4
    await store(connection, quote(D1, "6", revision=1))
    assert await connection.fetchval("select price from market_prices") == 6


async def test_a_trigger_waits_in_the_outbox_with_the_correction(connection: Connection) -> None:
    await close(connection, D1)
    await store(connection, quote(D1, "10"))
    row = await connection.fetchrow("select topic, message_key, value from outbox_events")
    seq = await connection.fetchval("select seq from corrections")
    assert (row["topic"], row["message_key"]) == ("reprocessing-triggers", b"S1")
    assert json.loads(row["value"]) == {
        "security_id": "S1",
        "earliest_impacted_date": "2025-09-01",
        "seq": seq,
        "reason": "price",
    }


async def test_no_price_slips_between_the_closing_of_a_date_and_its_valuation(
    connection: Connection, database: str
) -> None:
    other = await connect(database)
    closing = connection.transaction()
    await closing.start()
    await calendar.apply(connection, [D1])
    pricing = asyncio.create_task(store(other, quote(D1, "10")))
    done, _ = await asyncio.wait([pricing], timeout=0.3)
    assert not done, "the price must wait for the close"
    await closing.commit()
    assert (await pricing).corrections.keys() == {"S1"}, "and then see the date as closed"
    await other.close()


async def test_closing_a_date_again_is_a_no_op_and_an_earlier_one_corrects_every_held_security(
    connection: Connection,
) -> None:
    await connection.execute("insert into securities (security_id) values ('S1'), ('S2')")
    await connection.execute(
        "insert into position_state (security_id, portfolio_id, watermark_date) values ('S1', 'P1', '2025-08-31')"
    )
    assert await close(connection, D1, D3) == calendar.CalendarOutcome(2)
    assert await close(connection, D3) == calendar.CalendarOutcome(0)
    repaired = await close(connection, D2)
    assert (repaired.closed, repaired.corrections.keys()) == (1, {"S1"})
    assert await ledger(connection) == [("S1", D2, "calendar")]
