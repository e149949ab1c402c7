"""The backlog is counted once for all who look, and no more often than it may cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from sinks import backlog
from sinks.database import Connection, connect_pool


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with await connect_pool(database, size=4, name="backlog") as opened:
        yield opened


class Counting:
    """A count that ends when it is let."""

    def __init__(self) -> None:
        self.times = 0
        self.begun = asyncio.Event()
        self.let = asyncio.Event()

    async def __call__(self, connection: Connection) -> dict[str, Any]:
        self.times += 1
        self.begun.set()
        await self.let.wait()
        return {"dirty_keys": self.times}


async def look(pool: asyncpg.Pool, count: Counting) -> Any:
    async with pool.acquire() as connection:
        return (await backlog._part(connection, "keys", count, 300))[1]["dirty_keys"]


async def test_the_first_count_is_waited_for_and_shared(pool: asyncpg.Pool) -> None:
    count = Counting()
    first = asyncio.create_task(look(pool, count))
    await count.begun.wait()
    second = asyncio.create_task(look(pool, count))
    done, _ = await asyncio.wait([second], timeout=0.2)
    assert not done
    await pool.execute("select pg_sleep(0.01)")  # a count that takes so long is not repeated for a while
    count.let.set()
    assert (await first, await second) == (1, 1)
    assert count.times == 1


async def test_while_one_counts_others_are_content_with_what_there_is(pool: asyncpg.Pool) -> None:
    await pool.execute("update backlog set found = '{\"dirty_keys\": 7}' where part = 'keys'")
    count = Counting()
    first = asyncio.create_task(look(pool, count))
    await count.begun.wait()
    assert await look(pool, count) == 7
    count.let.set()
    assert await first == 1


async def test_what_takes_long_is_counted_rarely(pool: asyncpg.Pool) -> None:
    times = 0

    async def count(connection: Connection) -> dict[str, Any]:
        nonlocal times
        times += 1
        await connection.execute("select pg_sleep(0.02)")
        return {"dirty_keys": times}

    async with pool.acquire() as connection:
        for _ in range(5):
            await backlog._part(connection, "keys", count, 300)
            await connection.execute("update backlog set again_at = '-infinity' where part = 'keys' and $1", times < 4)
        row = await connection.fetchrow(
            "select took, extract(epoch from again_at - counted_at)::float8 as waits from backlog where part = 'keys'"
        )
    assert times == 4, "the fifth look comes too soon"
    assert len(row["took"]) == 2
    assert row["waits"] == pytest.approx(300 * (min(row["took"]) - 0.003), abs=0.1)


async def test_what_is_found_is_what_the_ledger_and_the_keys_say(pool: asyncpg.Pool) -> None:
    await pool.execute("insert into business_dates values ('2025-01-02'), ('2025-01-03')")
    await pool.execute("insert into securities values ('S', '2025-01-02')")
    await pool.execute(
        "insert into position_state (security_id, portfolio_id, watermark_date) values ('S', 'P', '2025-01-02')"
    )
    await pool.execute(
        "insert into corrections (seq, security_id, earliest_date, reason) values (1, 'S', '2025-01-03', 'price')"
    )
    async with pool.acquire() as connection:
        _, gauges = await backlog.read(connection)
    assert (gauges.dirty_keys, gauges.dirty_snapshots, gauges.corrections_open, gauges.gap_days) == (1, 1, 1, 1)
    assert str(gauges.business_date) == "2025-01-03"
