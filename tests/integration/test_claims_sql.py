"""What a claim of the valuation reads, however many others are open and however many keys have nothing to value."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import date
from typing import Any

import asyncpg
import pytest

from sinks import claims
from sinks.database import Pool, connect_pool
from sinks.valuation import Pass, Valuation
from tests.plans import Explaining

DAY, BEFORE = date(2025, 1, 3), date(2025, 1, 2)
KEYS, OTHERS = 200, 40


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    """As many sessions as claims."""
    async with await connect_pool(database, size=OTHERS + 1) as opened:
        await opened.execute("insert into business_dates values ($1), ($2)", BEFORE, DAY)
        yield opened


async def load(pool: Pool, securities: int, holders: int, closed_on: date | None = None) -> None:
    """Keys that are behind by a date."""
    await pool.execute(
        "insert into securities select 's' || lpad(s::text, 6, '0'), $1 from generate_series(1, $2) s",
        BEFORE,
        securities,
    )
    await pool.execute(
        """
        insert into position_state (security_id, portfolio_id, watermark_date, closed_on)
        select 's' || lpad(s::text, 6, '0'), 'p' || lpad(h::text, 6, '0'), $1, $4
        from generate_series(1, $2) s, generate_series(1, $3) h
        """,
        BEFORE,
        securities,
        holders,
        closed_on,
    )
    await pool.execute("vacuum analyze position_state, securities")


async def read(connection: asyncpg.Connection, statement: str, *arguments: Any) -> int:
    """The buffers that a statement reads."""
    explained = await connection.fetchval(f"explain (analyze, buffers, format json) {statement}", *arguments)
    plan = json.loads(explained)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def begun(connection: asyncpg.Connection) -> tuple[claims.Claims, list[str]]:
    """A new worker in a transaction, and the page that it would claim from."""
    worker = claims.Claims(KEYS)
    await connection.execute(claims.PLAN_FOR_THESE)
    await worker.look_up(connection, DAY)
    return worker, worker.next_page()


async def next_claim(connection: asyncpg.Connection) -> int:
    """What a new worker's claim reads now; it is not taken."""
    async with connection.transaction():
        worker, page = await begun(connection)
        cursors = [worker._cursors.get(security, "") for security in page]
        return await read(connection, claims._CLAIM, page, cursors, DAY, KEYS)


async def take(connection: asyncpg.Connection) -> int:
    """A claim of a new worker, which stays open; returns how many keys it has."""
    worker, page = await begun(connection)
    return len(await worker.claim(connection, page, DAY))


@pytest.mark.parametrize(("securities", "holders"), [(1_500, 15), (1, 20_000)], ids=["a crowd", "a giant"])
async def test_a_claim_reads_no_more_while_others_are_open(pool: Pool, securities: int, holders: int) -> None:
    await load(pool, securities, holders)
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(pool.acquire())
        alone = await next_claim(connection)
        for _ in range(OTHERS):
            other = await stack.enter_async_context(pool.acquire())
            await stack.enter_async_context(other.transaction())
            assert await take(other) == KEYS
        assert await next_claim(connection) <= 2 * alone


async def test_nothing_is_left_out_by_those_who_begin_in_the_middle(pool: Pool) -> None:
    await load(pool, 1, 2_000)
    workers = [Valuation(pool, KEYS) for _ in range(3)]
    async with pool.acquire() as connection, connection.transaction():
        assert await connection.fetchval("select pg_try_advisory_xact_lock($1, 0)", claims._LOCK)
        for worker in workers:  # none of them begins at the head
            for _ in range(8):
                await worker.pass_once()
    assert await pool.fetchval("select count(*) from position_state where watermark_date < $1", DAY) == 0
    assert await pool.fetchval("select valued_through from securities") == DAY


async def test_closed_keys_cost_the_same_each(pool: Pool) -> None:
    """Rows read for twice as many are at most twice as many: a claim goes on where the one before ended."""
    rows = []
    for holders in (2_000, 4_000):
        await pool.execute("truncate position_state, securities")
        await load(pool, 1, holders, closed_on=date(2025, 1, 1))
        async with pool.acquire() as connection, connection.transaction():
            books = Explaining(connection)
            valued = Valuation(books, KEYS)  # type: ignore[arg-type]
            passes = []
            while (done := await valued.pass_once()) != Pass():
                passes.append((done.keys, done.closed))
        assert passes[: holders // KEYS] == [(0, KEYS)] * (holders // KEYS)
        rows.append(sum(read.rows for ran in books.ran for read in ran.reads() if read.table == "position_state"))
    assert rows[1] <= 2.1 * rows[0], rows
