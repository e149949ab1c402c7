"""When the books are right, it is told: soon, once, and with what the correction changed, as it was then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from click.testing import CliRunner

from sinks import ledger, operations, progress, settling, valuation
from sinks.corrections import Right
from sinks.database import Connection
from sinks.valuation import Pass
from tests.engine import Engine
from tests.integration.test_books_sql import assert_right, dates, price, trade
from tidemark.main import main


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    engine = await Engine.on(database)
    yield engine
    await engine.pool.close()


async def right(engine: Engine, seq: int) -> bool:
    found: bool = await engine.pool.fetchval("select right_at is not null from corrections where seq = $1", seq)
    return found


async def test_a_stream_of_late_trades_puts_nothing_off(
    engine: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new key comes between each valuation and its settling, so there is never a moment without a key behind."""
    engine.valuation.claims.keys = 2
    await engine.take("business-dates", dates(1, 2, 3))
    await engine.take("prices", [price(1, 1)])
    await engine.take("transactions", [trade(f"h{n}", "BUY", 1, 10, 1, f"A{n}") for n in range(4)])
    await engine.drain()
    await engine.take("prices", [price(2, 2)])
    await engine.relay()
    await engine.open_jobs()
    while engine.running:
        await engine.reset_chunk(10)
    seq = await engine.pool.fetchval("select max(seq) from corrections where reason = 'price'")
    whole, number = settling.settle, 0

    async def settle(connection: Connection, passed: Sequence[str], latest: date | None) -> tuple[int, list[Right]]:
        nonlocal number
        number += 1
        await engine.take("transactions", [trade(f"n{number}", "BUY", 1, 10, 1, f"N{number}")])
        return await whole(connection, passed, latest)

    monkeypatch.setattr(settling, "settle", settle)
    await engine.value()
    assert not await right(engine, seq), "two of its four holders are not valued yet"
    for _ in range(3):
        await engine.value()
    assert await engine.pool.fetchval("select count(*) from dirty_keys") > 0
    assert await engine.pool.fetchval("select valued_through from securities") < date(2025, 1, 3)
    assert await right(engine, seq)
    monkeypatch.undo()
    await engine.drain()
    told = [event for _, event in engine.published if event.get("status") == "BOOKS_RIGHT"]
    assert [event["job_id"] for event in told if event["job_id"] == seq] == [seq], "once"
    await assert_right(engine, database)


async def test_before_any_date_is_closed_a_correction_is_right_at_once(engine: Engine) -> None:
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 2), trade("b", "BUY", 10, 100, 1)])
    await engine.take("transactions", [trade("a", "BUY", 11, 100, 2, revision=1)])
    assert [each.reason for each in (await engine.value()).right] == ["transaction"]
    assert await engine.value() == Pass()
    assert await engine.pool.fetchval("select count(*) from corrections where right_at is null") == 0
    assert await engine.pool.fetchval(
        "select valued_through = '-infinity' or valued_through < '2025-01-02' from securities"
    )


async def test_more_securities_than_a_sweep_looks_at_take_their_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones wait for a key that somebody holds; the last one is right all the same."""
    monkeypatch.setattr(valuation, "SECURITIES_AT_ONCE", 2)
    securities = [f"S{n}" for n in range(5)]
    await engine.take("business-dates", dates(1, 2))
    await engine.take("transactions", [trade(s, "BUY", 1, 10, 1, security=s) for s in securities])
    await engine.drain()
    async with engine.pool.acquire() as connection:
        for each in securities:
            await operations.reprocess(connection, "ann", date(2025, 1, 2), portfolio_id="P", security_id=each)
    await engine.pool.execute(
        "update position_state set reset_seq = null, watermark_date = '2025-01-02' where security_id = 'S4'"
    )
    await engine.pool.execute("update securities set valued_through = '2025-01-02' where security_id = 'S4'")
    async with engine.pool.acquire() as other, other.transaction():
        await other.execute("select from position_state where security_id < 'S4' for update")
        found = [each.security_id for _ in range(6) for each in (await engine.value()).right]
    assert found == ["S4"]


@pytest.mark.parametrize("closed", [True, False])
async def test_a_date_that_is_not_closed_is_not_valued_again(engine: Engine, database: str, closed: bool) -> None:
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2) if closed else [])
    await engine.drain()
    scopes: list[dict[str, Any]] = [
        {"security_id": "S"},
        {"portfolio_id": "P"},
        {"portfolio_id": "P", "security_id": "S"},
    ]
    says = "the latest closed date is 2025-01-02" if closed else "no date is closed"
    async with engine.pool.acquire() as connection:
        for scope in scopes:
            with pytest.raises(operations.Refused, match=f"nothing has been valued from 2025-01-03 on: {says}"):
                await operations.reprocess(connection, "ann", date(2025, 1, 3), **scope)
        assert await connection.fetchval("select count(*) from operator_actions") == 0
        assert await connection.fetchval("select count(*) from corrections") == 0
    environment = {"TIDEMARK_DATABASE_URL": database, "TIDEMARK_BROKER_URL": "kafka://127.0.0.1:1"}
    arguments = ["reprocess", "--security", "S", "2025-01-03"]
    done = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)
    assert (done.exit_code, done.output) == (1, f"Error: nothing has been valued from 2025-01-03 on: {says}\n")


async def snapshots(engine: Engine) -> dict[tuple[str, date], Decimal]:
    rows = await engine.pool.fetch("select portfolio_id, valuation_date, market_value from daily_position_snapshots")
    return {(row[0], row[1]): row[2] for row in rows}


async def effect(engine: Engine, seq: int) -> list[dict[str, Any]]:
    async with engine.pool.acquire() as connection:
        return await ledger.changed_values(connection, seq)


async def test_what_a_correction_changed_stays_as_it_was_told(engine: Engine) -> None:
    """Cancelled midway and requeued, valued five keys at a time, a date closed meanwhile; then all changes again."""
    engine.valuation.claims.keys = 6  # a closed key among them
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade(f"h{n:02}", "BUY", n + 1, 10, 1, f"H{n:02}") for n in range(12)])
    await engine.take("transactions", [trade("gone", "SELL", 5, 10, 2, "H04")])
    await engine.take("business-dates", dates(1, 2, 3, 4))
    await engine.drain()
    before = await snapshots(engine)
    await engine.take("prices", [price(3, "107.5")])
    await engine.take("business-dates", dates(5))
    seq = await engine.pool.fetchval("select max(seq) from corrections")
    await engine.relay()
    await engine.open_jobs()
    assert await effect(engine, seq) == [], "nothing is told before it is after"
    await engine.reset_chunk(6)
    await engine.value()
    midway = await effect(engine, seq)
    assert {row["portfolio_id"] for row in midway} == {f"H{n:02}" for n in (0, 1, 2, 3, 5)}
    async with engine.pool.acquire() as connection:
        await operations.cancel_job(connection, "ann", seq)
        await operations.requeue_job(connection, "ann", seq)
        so_far = await progress.correction_progress(connection, seq)
    assert so_far is not None
    assert (so_far.phase, so_far.snapshots_changed, so_far.keys_to_reset) == ("WAITING", 10, 6)
    engine.running.clear()
    engine.published.clear()
    await engine.drain()
    after = await snapshots(engine)

    changes = {place: abs(after[place] - value) for place, value in before.items() if after[place] != value}
    told = [event for _, event in engine.published if event.get("status") == "BOOKS_RIGHT"]
    assert [event["seqs"] for event in told] == [[seq, seq + 1]]
    (event,) = told
    assert (event["corrections"], event["earliest_impacted_date"]) == (2, "2025-01-03")
    assert (event["snapshots_changed"], Decimal(str(event["absolute_change"]))) == (len(changes), sum(changes.values()))
    assert (event["from_date"], event["to_date"]) == ("2025-01-03", "2025-01-04")
    async with engine.pool.acquire() as connection:
        mine = await progress.correction_progress(connection, seq)
    assert mine is not None
    assert (mine.snapshots_changed, mine.absolute_change) == (len(changes), sum(changes.values()))

    kept = await effect(engine, seq)
    largest = sorted((f"H{n:02}" for n in range(12) if n != 4), key=lambda p: -changes[p, date(2025, 1, 3)])[:10]
    assert [row["portfolio_id"] for row in kept] == largest
    assert await engine.pool.fetchval("select count(*) from correction_values") == len(largest), "and no more"
    for row in kept:
        place = (row["portfolio_id"], row["valuation_date"])
        assert place[1] == date(2025, 1, 3)
        assert (row["market_value_before"], row["market_value_after"]) == (before[place], after[place])
    await engine.take("prices", [price(3, 90), price(1, 50)])
    await engine.take("transactions", [trade("h11", "BUY", 99, 10, 1, "H11", revision=1)])
    await engine.drain()
    assert await snapshots(engine) != after
    assert await effect(engine, seq) == kept
    assert await engine.pool.fetchval("select count(*) from correction_changes") == 0


async def test_a_late_trade_tells_what_it_changed(engine: Engine) -> None:
    """What it adds to dates that were closed, and what a cancellation takes away."""
    await engine.take("prices", [price(1, 100)])
    await engine.take("business-dates", dates(1, 2, 3))
    await engine.take("transactions", [trade("a", "BUY", 2, 10, 3), trade("b", "BUY", 3, 10, 2)])
    await engine.drain()
    await engine.take("transactions", [trade("c", "BUY", 5, 10, 1)])
    await engine.take("business-dates", dates(4))
    await engine.drain()
    await engine.take("transactions", [trade(i, "BUY", 1, 1, 1, revision=1, cancelled=True) for i in ("a", "b", "c")])
    await engine.drain()
    first, second = [
        row[0] for row in await engine.pool.fetch("select seq from corrections order by seq desc limit 2")
    ][::-1]
    values = ("valuation_date", "quantity", "market_value_before", "market_value_after")
    assert [tuple(row[name] for name in values) for row in await effect(engine, first)] == [
        (date(2025, 1, 1), 5, None, 500)
    ]
    assert [tuple(row[name] for name in values) for row in await effect(engine, second)] == [
        (date(2025, 1, 1), 0, 500, None)
    ]
    sums = await engine.pool.fetch(
        "select snapshots_changed, absolute_change, changed_from, changed_to from corrections where seq = any($1) "
        "order by seq",
        [first, second],
    )
    assert [tuple(row) for row in sums] == [
        (3, 1_500, date(2025, 1, 1), date(2025, 1, 3)),
        (4, 500 + 800 + 1_000 + 1_000, date(2025, 1, 1), date(2025, 1, 4)),
    ]


async def test_a_job_cancelled_before_its_first_chunk_has_none(engine: Engine) -> None:
    await engine.take("transactions", [trade("a", "BUY", 2, 10, 1)])
    await engine.take("business-dates", dates(1))
    await engine.drain()
    await engine.take("prices", [price(1, 100)])
    await engine.relay()
    await engine.open_jobs()
    async with engine.pool.acquire() as connection:
        job = await operations.cancel_job(connection, "ann", engine.running.pop().job_id)
    assert (job["started_at"], job["finished_at"] is not None) == (None, True)
