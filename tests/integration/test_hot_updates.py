"""Resets, valuations and offsets write no index: their updates stay on the page of the row (HOT)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import date

import pytest

from sinks.batches import Batch
from sinks.database import Pool, connect_pool
from sinks.offsets import Offsets
from sinks.valuation import Valuation
from tests import herd
from tests.herd import issue, load

SECURITIES, HOLDERS = [f"S{number}" for number in range(50)], 100
KEYS = len(SECURITIES) * HOLDERS

_AUTOVACUUM = """
select current_setting('autovacuum') = 'on' or exists (
    select from pg_stat_activity where backend_type = 'autovacuum worker' and datname = current_database())
"""


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    """Of one session, which alone counts what is updated; without autovacuum, which would come when it likes.

    Of any table it could hold a snapshot just when a test's VACUUM must remove all that is dead.
    """
    async with await connect_pool(database, size=1) as opened:
        await opened.execute("alter system set autovacuum = off")
        await opened.execute("select pg_reload_conf()")
        try:
            async with asyncio.timeout(60):
                while await opened.fetchval(_AUTOVACUUM):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            yield opened
        finally:
            await opened.execute("alter system reset autovacuum")
            await opened.execute("select pg_reload_conf()")


async def updates(pool: Pool, table: str) -> tuple[int, int]:
    """(rows updated so far, those of them that stayed on their page)."""
    await pool.execute("select pg_stat_force_next_flush()")
    row = await pool.fetchrow("select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = $1", table)
    return row["n_tup_upd"], row["n_tup_hot_upd"]


async def reset(pool: Pool, securities: Sequence[str] = SECURITIES) -> None:
    jobs = await issue(pool, securities, date(2025, 1, 2))
    assert await herd.reset(pool, jobs) == len(securities) * HOLDERS


async def value(pool: Pool, securities: Sequence[str] = SECURITIES) -> None:
    assert (await Valuation(pool, KEYS).pass_once()).keys == len(securities) * HOLDERS


async def test_resets_and_valuations_of_whole_securities_write_no_index(pool: Pool) -> None:
    """A herd writes every row of a page at once: half of each page must be free."""
    await load(pool, SECURITIES, HOLDERS, dates=3)
    await pool.execute("vacuum analyze")
    shares = []
    for _ in range(5):
        for step in (reset, value):
            before = await updates(pool, "position_state")
            await step(pool)
            after = await updates(pool, "position_state")
            assert after[0] - before[0] == KEYS
            shares.append((after[1] - before[1]) / KEYS)
        await pool.execute("vacuum position_state")
    assert min(shares) > 0.85, shares


async def test_a_correction_of_a_few_keys_of_each_page_writes_no_index(pool: Pool) -> None:
    """Keys that came portfolio by portfolio lie apart from the others of their security."""
    await load(pool, SECURITIES, HOLDERS, dates=3)
    await pool.execute(
        """
        create temp table loaded as table position_state;
        truncate position_state;
        insert into position_state select * from loaded order by portfolio_id, security_id;
        """
    )
    await pool.execute("vacuum analyze")
    before = await updates(pool, "position_state")
    await reset(pool, SECURITIES[:5])
    await value(pool, SECURITIES[:5])
    after = await updates(pool, "position_state")
    assert after[0] - before[0] == 2 * 5 * HOLDERS
    assert after[1] - before[1] > 0.95 * 2 * 5 * HOLDERS


async def test_offsets_move_within_their_page(pool: Pool) -> None:
    async def get() -> Pool:
        return pool

    async def nothing(connection: object) -> None:
        pass

    worker = Offsets(get, "group", lambda: False)
    places = [("topic", partition) for partition in range(20)]
    claims = await worker.claim(dict.fromkeys(places, 0))
    for offset in range(1, 51):
        for place in places:
            await worker.step(Batch(*place, claims[place].epoch, offset - 1, []), offset, nothing)
    updated, stayed = await updates(pool, "kafka_offsets")
    assert updated == 1_000
    assert stayed > 0.95 * updated, stayed
