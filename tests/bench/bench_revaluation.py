"""Revaluation of a dirty range by two workers, beside one statement that computes the same into an empty table.

The workers find what is there already and write what differs: all snapshots, or one in fifteen. They lock the keys,
move their watermarks and queue a message for each changed snapshot as well; the statement does nothing but compute.
"""

from __future__ import annotations

import asyncio
import time
from datetime import date
from functools import partial

import asyncpg

from sinks.database import connect_pool
from sinks.valuation import Valuation
from tests.bench.harness import Bench, timed
from tests.herd import issue, load, reset

_SECURITY = "GIANT"
_DATES, _DIRTY = 20, 15
_FROM = date(2025, 1, 1 + _DATES - _DIRTY)
_LAST = date(2025, 1, _DATES)
_WORKERS, _KEYS_AT_ONCE = 2, 2_000

_COMPUTE = """
insert into again
select s.security_id, s.portfolio_id, d.business_date, s.epoch, h.quantity, h.cost_basis, p.price, p.price_date,
       round_half_even(h.quantity * p.price, 10), round_half_even(h.quantity * p.price, 10) - h.cost_basis,
       case when p.price_date = d.business_date then 'VALUED_CURRENT' else 'VALUED_STALE' end
from position_state s
cross join business_dates d
cross join lateral (
    select quantity, cost_basis from position_history h
    where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null
      and h.position_date <= d.business_date
    order by h.position_date desc, h.sequence desc limit 1
) as h
cross join lateral (
    select price, price_date from market_prices m
    where m.security_id = s.security_id and m.price_date <= d.business_date order by price_date desc limit 1
) as p
where s.security_id = $1 and d.business_date >= $2
"""
_AS_MANY = "select count(*) from again join daily_position_snapshots using (security_id, portfolio_id, valuation_date)"


async def run(bench: Bench) -> None:
    """All snapshots differ; one in fifteen does."""
    holders = bench.size(50_000, 3_000)
    async with bench.database() as dsn:
        pool = await connect_pool(dsn, size=4)
        try:
            bench.say(f"revaluation: loading {holders:,} holders, {_DATES} dates")
            await load(pool, [_SECURITY], holders, dates=_DATES)
            await pool.execute("create table again (like daily_position_snapshots including all)")
            await pool.execute("vacuum analyze")
            for name, until, wanted in (("all differ", _LAST, 0.9), ("one in 15 differs", _FROM, 1.5)):
                await bench.compare(
                    f"revaluation by two workers, {name}",
                    "snapshots/s",
                    partial(_revalued, pool, holders, until),
                    ("INSERT ... SELECT into an empty table", partial(_computed, pool, holders)),
                    wanted=wanted,
                )
        finally:
            await pool.close()


async def _computed(pool: asyncpg.Pool, holders: int) -> float:
    await pool.execute("truncate again")
    await pool.execute("checkpoint")
    seconds = await timed(pool.execute(_COMPUTE, _SECURITY, _FROM))
    assert await pool.fetchval(_AS_MANY) == holders * _DIRTY
    return holders * _DIRTY / seconds


async def _revalued(pool: asyncpg.Pool, holders: int, until: date) -> float:
    """Other prices from the first dirty date until this one, all keys reset; timed until the books are right."""
    await pool.execute(
        "update market_prices set price = price + 1 where security_id = $1 and price_date between $2 and $3",
        _SECURITY, _FROM, until,
    )  # fmt: skip
    await reset(pool, await issue(pool, [_SECURITY], _FROM))
    await pool.execute("truncate outbox_events")
    await pool.execute("vacuum position_state, daily_position_snapshots")
    await pool.execute("checkpoint")
    started = time.perf_counter()
    await asyncio.gather(*(_value(pool) for _ in range(_WORKERS)))
    return holders * _DIRTY / (time.perf_counter() - started)


async def _value(pool: asyncpg.Pool) -> None:
    valuation = Valuation(pool, _KEYS_AT_ONCE)
    while await pool.fetchval("select exists (select from corrections where right_at is null)"):
        if not (await valuation.pass_once()).keys:
            await asyncio.sleep(0.005)
