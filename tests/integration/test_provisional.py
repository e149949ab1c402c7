"""No value that is wrong is told as final, in whatever state a correction is; and all who tell readers agree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from click.testing import CliRunner

from sinks import backlog, operations, resets
from sinks.corrections import Debounce
from sinks.valuation import Pass
from streams.settings import load_named
from streams.web.api import Api
from streams.web.pages import key as key_page
from tests import finality, scenarios
from tests.engine import Engine
from tests.integration.test_books_sql import dates, price, trade
from tidemark.audit import audit_books
from tidemark.main import main

SHAPE = scenarios.Shape(events=600, portfolios=6, securities=2, business_dates=12, open_dates=0)
STATES = {"NO JOB", "PENDING", "PROCESSING midway", "CANCELLED", "CANCELLED midway", "FAILED", "FAILED midway"}


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    engine = await Engine.on(database)
    yield engine
    await engine.pool.close()


async def check(engine: Engine, context: object) -> finality.Moment:
    """What readers are told is what the definition demands, and nothing wrong is told as final."""
    async with engine.pool.acquire() as connection:
        now = await finality.look(connection, engine.method)
    final = {place: text for place, text in now.wrong.items() if not now.told[place]}
    assert final == {}, context
    for place, told in now.told.items():
        assert told == now.demanded[place] or (told and place[0] in now.ambiguous), (context, place)
    assert {place: now.told[place] for place in now.rows_told} == now.rows_told, context
    assert {place[0] for place in now.wrong} <= now.dirty, context
    return now


async def act(engine: Engine, chance: random.Random) -> None:
    """What an operator does, or a job that fails for good, before its first chunk or after it."""
    await engine.relay()
    await engine.open_jobs()
    if engine.running and chance.random() < 0.5:
        await engine.reset_chunk(1)
    async with engine.pool.acquire() as connection:
        match chance.randrange(4):
            case 0 if engine.running:
                await operations.cancel_job(connection, "ann", engine.running.pop().job_id)
            case 1 if engine.running:
                async with connection.transaction():
                    await resets.fail(connection, engine.running.pop(), "no")
            case 2:
                await requeue(engine, chance)
            case 3 if days := await connection.fetch("select business_date from business_dates"):
                scope = {"security_id": "S0", "portfolio_id": chance.choice([None, "P0", "P1"])}
                with contextlib.suppress(operations.Refused):  # it may not have been held yet
                    await operations.reprocess(connection, "ann", chance.choice(days)[0], **scope)


async def requeue(engine: Engine, chance: random.Random) -> bool:
    """One of the jobs that hold corrections; whether there was one."""
    held = await engine.pool.fetch("select distinct job_id from corrections where held and right_at is null order by 1")
    if not held:
        return False
    async with engine.pool.acquire() as connection:
        await operations.requeue_job(connection, "ann", chance.choice(held)[0])
    return True


@pytest.mark.parametrize("seed", range(2))
async def test_in_every_state_of_a_correction_no_wrong_value_is_told_as_final(database: str, seed: int) -> None:
    chance = random.Random(seed)
    engine = await Engine.on(database, "FIFO" if seed % 2 else "AVCO", keys=chance.choice([1, 3]))
    events = scenarios.generate(seed, SHAPE)
    seen: set[str] = set()
    wrong = 0
    try:
        while events:
            topic, size = events[0][0], chance.choice([1, 3, 10])
            batch = [record for t, record in events[:size] if t == topic]
            events = [event for event in events[:size] if event[0] != topic] + events[size:]
            engine.debounce = Debounce(3600, 7200) if chance.random() < 0.2 else None
            await engine.take(topic, batch)
            for _ in range(chance.randrange(1, 5)):
                await (act(engine, chance) if chance.random() < 0.3 else engine.do_something(chance))
                now = await check(engine, (seed, len(events)))
                seen |= now.states
                wrong += len(now.wrong)
        assert wrong > 200
        assert seen >= STATES
        while True:
            await engine.pool.execute("update corrections set reissue_at = clock_timestamp() where reset_at is null")
            await engine.reissue()
            await engine.drain()
            if not await requeue(engine, chance):
                break
        assert await engine.value() == Pass()
        now = await check(engine, seed)
        assert not any(now.told.values())
        assert (now.dirty, set(now.since.values())) == (set(), {None})
        assert await engine.pool.fetchval("select count(*) from reach") == 0
    finally:
        await engine.pool.close()


async def test_a_date_names_the_oldest_correction_that_it_waits_for(engine: Engine) -> None:
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade(f"t{n}", "BUY", 10, 100, 1, f"P{n}") for n in range(4)])
    await engine.take("business-dates", dates(1, 2, 3, 4))
    await engine.drain()
    for day in (4, 3, 2):
        await engine.take("prices", [price(day, 90 + day)])
    seqs = [row[0] for row in await engine.pool.fetch("select seq from corrections order by seq")]

    async def causes(portfolio: str) -> dict[int, int | None]:
        rows = await engine.pool.fetch(
            "select valuation_date, provisional, provisional_since_seq from current_valuations where portfolio_id = $1",
            portfolio,
        )
        assert all(row["provisional"] or row["provisional_since_seq"] is None for row in rows)
        return {row[0].day: row[2] for row in rows}

    assert await causes("P0") == {1: None, 2: seqs[2], 3: seqs[1], 4: seqs[0]}
    await engine.relay()
    await engine.open_jobs()  # the first trigger's job covers the first correction
    await engine.reset_chunk(2)
    assert await causes("P0") == {1: None, 2: seqs[2], 3: seqs[1], 4: seqs[0]}, "reset, and not valued yet"
    await engine.value()
    assert await causes("P0") == {1: None, 2: seqs[2], 3: seqs[1], 4: seqs[1]}, "valued past the first one"
    assert await causes("P3") == {1: None, 2: seqs[2], 3: seqs[1], 4: seqs[0]}
    await engine.drain()
    await engine.take("business-dates", dates(5))
    await engine.pool.execute(
        "insert into daily_position_snapshots select security_id, portfolio_id, '2025-01-05', 0, 0, 0, 0, null, 0, 0, "
        "'UNVALUED' from position_state"
    )
    rows = await engine.pool.fetch("select provisional, provisional_since_seq from current_valuations "
                                   "where valuation_date = '2025-01-05'")  # fmt: skip
    assert {tuple(row) for row in rows} == {(True, None)}, "closed lately, and no correction"


@asynccontextmanager
async def console(engine: Engine) -> AsyncIterator[TestClient[Any, Any]]:
    """The API and the page of a key, without a worker around them."""

    async def pool() -> Any:
        return engine.pool

    app: Any = SimpleNamespace(pool=pool, settings=load_named(), outbox_written=lambda: None)
    application = web.Application()
    Api(app, None, None).add_routes(application)  # type: ignore[arg-type]
    key_page.Key(app).add_routes(application)
    async with TestClient(TestServer(application)) as client:
        yield client


async def run(database: str, *arguments: str) -> str:
    """A command, as a shell would run it."""
    environment = {"TIDEMARK_DATABASE_URL": database, "TIDEMARK_BROKER_URL": "kafka://127.0.0.1:1", "COLUMNS": "200"}
    done = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)
    assert done.exit_code in (0, 1), done.output
    return done.output


async def test_view_gauge_console_api_commands_and_audit_agree(engine: Engine, database: str) -> None:
    """Six keys, two of them closed; a late price from the fourth day on, waiting, cancelled midway, valued."""
    await engine.take("prices", [price(1, 100)])
    await engine.take("transactions", [trade(f"t{n}", "BUY", 10, 100, 1, f"P{n}") for n in range(6)])
    await engine.take("transactions", [trade("s4", "SELL", 10, 100, 2, "P4"), trade("s5", "SELL", 10, 100, 3, "P5")])
    await engine.take("business-dates", dates(1, 2, 3, 4, 5))
    await engine.drain()
    await engine.take("business-dates", dates(6))  # which closed keys need not wait for
    await engine.value()
    await agree(engine, database, {})
    await engine.take("prices", [price(4, 90)])
    await agree(engine, database, {f"P{n}": 4 for n in range(4)})
    await engine.relay()
    await engine.open_jobs()
    await engine.reset_chunk(2)
    await engine.value()
    async with engine.pool.acquire() as connection:
        await operations.cancel_job(connection, "ann", engine.running.pop().job_id)
    await agree(engine, database, {"P2": 4, "P3": 4})
    await engine.take("business-dates", dates(7))
    await agree(engine, database, {"P0": 7, "P1": 7, "P2": 4, "P3": 4})
    async with engine.pool.acquire() as connection:
        (job_id,) = await connection.fetchrow("select job_id from reprocessing_jobs")
        await operations.requeue_job(connection, "ann", job_id)
    await engine.drain()
    await agree(engine, database, {})


async def agree(engine: Engine, database: str, provisional: dict[str, int]) -> None:
    """provisional: by portfolio, the first day of January that is not final."""
    await check(engine, provisional)
    wanted = {portfolio: date(2025, 1, day) for portfolio, day in provisional.items()}
    rows = await engine.pool.fetch("select portfolio_id, provisional_from from dirty_keys")
    assert dict(map(tuple, rows)) == wanted
    await engine.pool.execute("update backlog set again_at = '-infinity'")
    async with engine.pool.acquire() as connection:
        _, gauges = await backlog.read(connection)
    latest = await engine.pool.fetchval("select max(business_date) from business_dates")
    dirty_dates = sum((latest - day).days + 1 for day in wanted.values())
    assert (gauges.dirty_keys, gauges.dirty_snapshots) == (len(wanted), dirty_dates)
    shown = json.loads(await run(database, "status", "--json"))["books"]
    assert (shown["dirty_keys"], shown["dirty_snapshots"]) == (len(wanted), dirty_dates)
    assert shown["right"] == (not wanted and gauges.corrections_open == 0)
    audit = await audit_books(database, engine.method)
    assert ([key[0] for key in audit.waiting], audit.differences) == (sorted(wanted), [])
    async with console(engine) as client:
        for number in range(6):
            portfolio = f"P{number}"
            first = wanted.get(portfolio)
            rows = await engine.pool.fetch(
                "select valuation_date, provisional from current_valuations where portfolio_id = $1", portfolio
            )
            dates_told = {row[0] for row in rows if row[1]}
            assert dates_told == {row[0] for row in rows if first and row[0] >= first}
            answer = await (await client.get(f"/api/portfolios/{portfolio}/securities/S")).json()
            assert answer["provisional_from"] == (first.isoformat() if first else None)
            page = await (await client.get(f"/portfolios/{portfolio}/securities/S")).text()
            assert ("no provisional dates" in page) == (first is None)
            assert (f"provisional from {first}" in page) == (first is not None)
            assert page.count('<span class="pill warn">provisional</span>') == len(dates_told)
            shown = await run(database, "values", portfolio, "S")
            assert sum(" yes" in line for line in shown.splitlines()) == len(dates_told)
