"""Closed positions, settling corrections, operators' corrections, progress: what the herd means for the books."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import pytest

from sinks import actions, operations, progress
from sinks.corrections import Debounce
from sinks.valuation import Pass
from tests.engine import Engine
from tests.integration.test_books_sql import assert_right, dates, price, snapshots, trade


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    engine = await Engine.on(database)
    yield engine
    await engine.pool.close()


async def closed_on(engine: Engine, portfolio: str = "P") -> date | None:
    return await engine.pool.fetchval("select closed_on from position_state where portfolio_id = $1", portfolio)


async def dirty(engine: Engine) -> list[str]:
    return [row[0] for row in await engine.pool.fetch("select portfolio_id from dirty_keys order by 1")]


async def test_a_closed_position_is_not_valued_day_by_day(engine: Engine, database: str) -> None:
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1), trade("b", "SELL", 10, 100, 2)])
    await engine.take("transactions", [trade("c", "BUY", 10, 100, 1, "OPEN")])
    await engine.take("business-dates", dates(1, 2, 3))
    await engine.drain()
    assert await closed_on(engine) == date(2025, 1, 2)
    await engine.take("business-dates", dates(4))
    done = await engine.value()
    assert (done.keys, done.closed) == (1, 1)
    await engine.take("prices", [price(4, 110)])  # late, and of no concern to P
    assert await dirty(engine) == ["OPEN"]
    await engine.drain()
    assert await engine.pool.fetchval("select keys_total from reprocessing_jobs") == 1
    await assert_right(engine, database)


async def test_a_late_price_reaches_who_closed_over_the_weekend(engine: Engine, database: str) -> None:
    """The row of zeros stands on the next business date, with that date's price."""
    await engine.take("prices", [price(3, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 3), trade("b", "SELL", 10, 100, 4)])
    await engine.take("business-dates", dates(2, 3, 6))
    await engine.drain()
    assert (await snapshots(engine))[6] == (0, 100, 0, 0, "VALUED_STALE")
    await engine.take("prices", [price(6, 120)])
    assert await dirty(engine) == ["P"]
    await engine.drain()
    assert (await snapshots(engine))[6] == (0, 120, 0, 0, "VALUED_CURRENT")
    await engine.take("business-dates", dates(5))  # a calendar repair moves the row of zeros
    await engine.drain()
    assert {day: row[0] for day, row in (await snapshots(engine)).items()} == {3: 10, 5: 0}
    await assert_right(engine, database)


async def test_what_a_rebuild_closes_is_due_until_valued(engine: Engine, database: str) -> None:
    await engine.take("prices", [price(1, 100)])
    life = [trade("a", "BUY", 10, 100, 1), trade("b", "SELL", 10, 100, 2), trade("c", "BUY", 5, 100, 5)]
    await engine.take("transactions", life)
    await engine.take("business-dates", dates(1, 2, 3, 4, 5, 6, 7))
    await engine.drain()
    assert sorted(await snapshots(engine)) == [1, 2, 5, 6, 7]
    await engine.take("transactions", [trade("c", "BUY", 5, 100, 5, revision=1, cancelled=True)])
    assert await dirty(engine) == ["P"]
    await engine.drain()
    assert sorted(await snapshots(engine)) == [1, 2]
    everything = [trade(id_, "BUY", 10, 100, 1, revision=1, cancelled=True) for id_ in ("a", "b")]
    await engine.take("transactions", everything)
    assert await dirty(engine) == ["P"]
    await engine.drain()
    assert await snapshots(engine) == {}
    await engine.take("business-dates", dates(8))
    assert await engine.value() == Pass(closed=1, securities=1)
    await engine.take("transactions", [trade("d", "BUY", 10, 100, 9)])  # and it lives again
    await engine.take("business-dates", dates(9))
    await engine.drain()
    assert sorted(await snapshots(engine)) == [9]
    await assert_right(engine, database)


async def test_a_restatement_settles_into_one_job(engine: Engine, database: str) -> None:
    engine.debounce = Debounce(3600, 7200)
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(*range(1, 29)))
    await engine.drain()
    for day in range(28, 0, -1):
        await engine.take("prices", [price(day, 100 + day)])
    assert await engine.pool.fetchval("select count(*) from corrections") == 28
    assert await dirty(engine) == ["P"]
    await engine.drain()
    assert await engine.reissue() == 0  # still settling
    assert await engine.pool.fetchval("select count(*) from reprocessing_jobs") == 0
    due = await engine.pool.fetch("select distinct reissue_at from corrections")
    assert len(due) == 1  # they come due together
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    assert (await engine.reissue(), await engine.reissue()) == (1, 0)
    engine.published.clear()
    await engine.drain()
    triggers = [event for topic, event in engine.published if topic == "reprocessing-triggers"]
    assert [(t["earliest_impacted_date"], t["reason"]) for t in triggers] == [("2025-01-01", "price")]
    assert await engine.pool.fetchval("select count(*) from reprocessing_jobs") == 1
    await assert_right(engine, database)


async def test_settling_has_a_ceiling(engine: Engine) -> None:
    engine.debounce = Debounce(3600, 10)
    await engine.take("business-dates", dates(1, 2, 3))
    await engine.take("prices", [price(1, 100)])
    first = await engine.pool.fetchval("select issued_at from corrections")
    await engine.take("prices", [price(2, 100)])
    rows = await engine.pool.fetch("select reissue_at from corrections")
    assert {round((row[0] - first).total_seconds()) for row in rows} == {10}
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    await engine.reissue()
    await engine.take("prices", [price(3, 100)])  # a burst of its own
    late = await engine.pool.fetchval("select reissue_at - issued_at from corrections order by seq desc limit 1")
    assert 9 < late.total_seconds() < 11


async def test_a_settled_trigger_that_is_lost_is_repaired(engine: Engine, database: str) -> None:
    engine.debounce = Debounce(3600, 7200)
    await engine.take("transactions", [trade("a", "BUY", 10, 100, 1)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("prices", [price(1, 90)])
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    assert await engine.reissue() == 1
    await engine.pool.execute("delete from outbox_events")
    await engine.pool.execute("update corrections set reissue_at = clock_timestamp()")
    assert await engine.reissue() == 1
    await engine.drain()
    assert [e["reason"] for topic, e in engine.published if topic == "reprocessing-triggers"] == ["repair"]
    await assert_right(engine, database)


@pytest.mark.parametrize("scope", ["security", "portfolio", "key"])
async def test_an_operators_correction_takes_the_same_path(engine: Engine, database: str, scope: str) -> None:
    portfolios = ("P", "Q")
    await engine.take("prices", [price(1, 100), price(1, 50, "T")])
    for security in ("S", "T"):
        await engine.take(
            "transactions",
            [trade(f"{security}{p}", "BUY", 10, 100, 1, p, security=security) for p in portfolios],
        )
    await engine.take("business-dates", dates(1, 2, 3, 4))
    await engine.drain()
    await engine.pool.execute(
        "update daily_position_snapshots set market_value = 1 where valuation_date >= '2025-01-02'"
    )
    reached = {
        "security": {("P", "S"), ("Q", "S")},
        "portfolio": {("P", "S"), ("P", "T")},
        "key": {("P", "S")},
    }[scope]
    async with engine.pool.acquire() as connection:
        with pytest.raises(operations.Refused, match=r"has never held|is unknown"):
            await operations.reprocess(connection, "ann", date(2025, 1, 3), **_scope(scope, "NO", "NO"))
        assert await connection.fetchval("select count(*) from operator_actions") == 0
        found = await operations.reprocess(connection, "ann", date(2025, 1, 3), **_scope(scope, "P", "S"))
    assert set(found.seqs) == {security for _, security in reached}
    assert set(await engine.pool.fetch("select portfolio_id, security_id from dirty_keys")) == reached
    await engine.drain()
    wrong = await engine.pool.fetch(
        "select portfolio_id, security_id, count(*) from daily_position_snapshots where market_value = 1 group by 1, 2"
    )
    assert {(p, s): n for p, s, n in wrong} == {
        (p, s): 1 if (p, s) in reached else 3 for p in portfolios for s in ("S", "T")
    }
    assert await engine.pool.fetchval("select count(*) from corrections where right_at is null") == 0
    assert await engine.pool.fetchval("select reason from corrections order by seq desc limit 1") == "operator"
    (action,) = [a for a in await _actions(engine) if a["action"] == "reprocess"]
    assert (action["actor"], action["arguments"]["from_date"]) == ("ann", "2025-01-03")


def _scope(scope: str, portfolio: str, security: str) -> dict[str, Any]:
    return {
        "security": {"security_id": security},
        "portfolio": {"portfolio_id": portfolio},
        "key": {"portfolio_id": portfolio, "security_id": security},
    }[scope]


async def _actions(engine: Engine) -> list[dict[str, Any]]:
    async with engine.pool.acquire() as connection:
        return await actions.latest(connection)


async def test_impact_says_what_the_correction_then_does(engine: Engine) -> None:
    await engine.take("prices", [price(1, 100)])
    holders = [trade(f"h{n}", "BUY", 10, 100, 1, f"H{n}") for n in range(4)]
    gone = [trade("g1", "BUY", 10, 100, 1, "GONE"), trade("g2", "SELL", 10, 100, 2, "GONE")]
    await engine.take("transactions", holders + gone)
    await engine.take("business-dates", dates(1, 2, 3, 4))
    await engine.drain()
    async with engine.pool.acquire() as connection:
        await operations.throttle(connection, "ann", 8)
        found = await operations.impact(connection, "S", date(2025, 1, 3))
        assert (found.keys, found.snapshots, found.reset_seconds) == (4, 8, 0.5)
        await operations.pause(connection, "ann", 8)
        assert (await operations.impact(connection, "S", date(2025, 1, 3))).reset_seconds is None
        with pytest.raises(operations.Refused, match="is unknown"):
            await operations.impact(connection, "X", date(2025, 1, 3))
    await engine.take("prices", [price(3, 90)])
    await engine.relay()
    await engine.open_jobs()
    assert await engine.pool.fetchval("select keys_total from reprocessing_jobs") == found.keys


async def test_progress_follows_a_correction_until_the_books_are_right(engine: Engine) -> None:
    engine.valuation.claims.keys = 2
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade(f"h{n}", "BUY", 10, 100, 1, f"H{n}") for n in range(6)])
    await engine.take("business-dates", dates(1, 2, 3, 4))
    await engine.drain()
    await engine.take("prices", [price(3, 90)])
    seq = await engine.pool.fetchval("select seq from corrections")

    async def look() -> progress.CorrectionProgress:
        async with engine.pool.acquire() as connection:
            (of_security,) = await progress.security_progress(connection, "S")
            found = await progress.correction_progress(connection, seq)
            assert await progress.correction_progress(connection, -1) is None
        assert found is not None
        assert of_security.seq == seq
        return found

    assert (await look()).phase == "WAITING"
    await engine.relay()
    await engine.open_jobs()
    assert ((await look()).phase, (await look()).keys_total) == ("WAITING", 6)
    await engine.reset_chunk(4)
    now = await look()
    assert (now.phase, now.keys_done, now.keys_to_value, now.dates_left) == ("RESETTING", 4, 4, 8)
    assert now.keys_per_second is not None
    assert now.eta_seconds is not None
    await engine.reset_chunk(4)
    assert ((await look()).phase, (await look()).dates_left) == ("VALUING", 12)
    await engine.value()
    now = await look()
    assert (now.phase, now.keys_to_value, now.dates_left) == ("VALUING", 4, 8)
    await engine.drain()
    now = await look()
    assert (now.phase, now.keys_to_value, now.dates_left, now.eta_seconds) == ("RIGHT", 0, 0, None)
    assert now.seconds_to_right is not None
    assert now.seconds_to_right > 0


async def test_a_correction_and_a_closed_date_take_turns(engine: Engine, database: str) -> None:
    engine.valuation.claims.keys = 1
    await engine.take("prices", [price(1, 100), price(1, 100, "T")])
    for security in ("S", "T"):
        await engine.take(
            "transactions",
            [trade(f"{security}{n}", "BUY", 10, 100, 1, f"H{n}", security=security) for n in range(5)],
        )
    await engine.take("business-dates", dates(1, 2, 3))
    await engine.drain()
    await engine.take("prices", [price(2, 90)])
    await engine.relay()
    await engine.open_jobs()
    while engine.running:
        await engine.reset_chunk(10)
    await engine.take("business-dates", dates(4))
    for _ in range(4):
        await engine.value()
    left = await engine.pool.fetch(
        "select security_id, count(*) from position_state where watermark_date < '2025-01-04' group by 1 order by 1"
    )
    assert [tuple(row) for row in left] == [("S", 3), ("T", 3)]
    await engine.drain()
    await assert_right(engine, database)


async def test_the_valuation_takes_priority_first(engine: Engine) -> None:
    engine.valuation.claims.keys = 1
    for security in ("A", "B"):
        await engine.take("prices", [price(1, 100, security)])
        await engine.take("transactions", [trade(security, "BUY", 10, 100, 1, security=security)])
    await engine.take("business-dates", dates(1, 2))
    await engine.drain()
    await engine.take("prices", [price(2, 90, "A"), price(2, 90, "B")])
    await engine.relay()
    await engine.open_jobs()
    async with engine.pool.acquire() as connection:
        job_id = await connection.fetchval("select job_id from reprocessing_jobs where security_id = 'B'")
        await operations.prioritise_job(connection, "ann", job_id, 1)
    while engine.running:
        await engine.reset_chunk(10)
    await engine.value()
    due = await engine.pool.fetch("select security_id from dirty_keys")
    assert [row[0] for row in due] == ["A"]
