"""When the books are right, it is told: soon, once, and with what the correction changed, as it was then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import date
from typing import Any

import pytest
from click.testing import CliRunner

from sinks import operations, settling, valuation
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
    engine.valuation._keys = 2
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
    assert await engine.pool.fetchval("select valued_through = '-infinity' or valued_through < '2025-01-02' from securities")


async def test_more_securities_than_a_sweep_looks_at_take_their_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones wait for a key that somebody holds; the last one is right all the same."""
    monkeypatch.setattr(valuation, "_SECURITIES_AT_ONCE", 2)
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
    scopes: list[dict[str, Any]] = [{"security_id": "S"}, {"portfolio_id": "P"}, {"portfolio_id": "P", "security_id": "S"}]
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
