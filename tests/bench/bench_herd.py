"""The herd: resets, books right, cost by table size, many jobs, the limit, live traffic, intake (docs/performance.md).

Kafka is left out: what is measured is the watermark sink as it runs (window, fence, cursor, limiter, chunks) and the
valuation, beside the plain SQL that does the same work on the same rows.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import date, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import asyncpg

from sinks import operations, prices
from sinks.database import connect_pool
from sinks.limiter import set_first_value
from sinks.model import Job, Price
from sinks.valuation import Valuation
from tests.bench.harness import Bench, Result, Work, percentile, timed
from tests.herd import HerdWorker, herd_worker, issue, load, until

_DATES = 20
_LAST = date(2025, 1, _DATES)
_LATE = _LAST - timedelta(days=14)  # 15 business dates late, itself included

_SETTLING = 3  # rounds until the plans have settled

_PLAIN_RESET = """
update position_state set watermark_date = least(watermark_date, $2::date - 1), reset_seq = least(reset_seq, 1),
    status = 'REPROCESSING'
where security_id = $1
"""

_AS_BEFORE = """
update position_state set watermark_date = $1, reset_seq = null, status = 'CURRENT' where watermark_date < $1
"""

# The whole recomputation in one statement, as good as we know how: only what differs is written.
_PLAIN_RECOMPUTATION = """
with wanted as (
    select h.security_id, h.portfolio_id, d.business_date as valuation_date, h.quantity, h.cost_basis, q.price,
           q.price_date, round_half_even(h.quantity * q.price, 10) as value
    from position_history h
    cross join business_dates d
    cross join lateral (
        select price, price_date from market_prices p
        where p.security_id = h.security_id and p.price_date <= d.business_date order by p.price_date desc limit 1
    ) as q
    where h.security_id = $1 and d.business_date >= $2
)
update daily_position_snapshots s set price = w.price, price_date = w.price_date, market_value = w.value,
    unrealized_gain_loss = w.value - w.cost_basis
from wanted w
where s.security_id = w.security_id and s.portfolio_id = w.portfolio_id and s.valuation_date = w.valuation_date
  and (s.price, s.price_date, s.market_value) is distinct from (w.price, w.price_date, w.value)
"""


async def run(bench: Bench) -> None:
    """All lines; each database is dropped before the next."""
    await _resets(bench)
    await _table_size(bench)
    await _rates(bench)
    await _live_traffic(bench)
    await _intake(bench)


@asynccontextmanager
async def _books(bench: Bench) -> AsyncIterator[tuple[str, asyncpg.Pool]]:
    async with bench.database() as dsn:
        pool = await connect_pool(dsn, size=8)
        yield dsn, pool
        await pool.close()


@asynccontextmanager
async def _worker(dsn: str, group: str, **changes: object) -> AsyncIterator[HerdWorker]:
    async with herd_worker(dsn, Path(tempfile.gettempdir()), group=group, **changes) as worker:
        yield worker


async def _as_before(pool: asyncpg.Pool) -> None:
    await pool.execute(_AS_BEFORE, _LAST)
    await pool.execute("update securities set valued_through = $1 where valued_through < $1", _LAST)
    await pool.execute("update corrections set reset_at = now(), right_at = now() where right_at is null")
    await pool.execute("truncate outbox_events")
    await pool.execute("vacuum position_state, daily_position_snapshots")


async def _resets(bench: Bench) -> None:
    """One security with many holders, the same keys in many securities; resets, then until the books are right."""
    holders = bench.size(100_000, 5_000)
    many = [f"S{n:05}" for n in range(holders // 10)]
    async with _books(bench) as (dsn, pool):
        bench.say(f"herd: loading {holders:,} holders twice, {_DATES} dates")
        await load(pool, ["GIANT"], holders, dates=_DATES)
        await load(pool, many, 10, dates=_DATES)
        await pool.execute("vacuum analyze")
        async with _worker(dsn, "resets") as worker:
            price = Decimal(20)

            async def corrected(securities: list[str]) -> list[Job]:
                nonlocal price
                price += 1
                await pool.execute(
                    "update market_prices set price = $1 where security_id = any($2::text[]) and price_date = $3",
                    price, securities, _LATE,
                )  # fmt: skip
                return await issue(pool, securities, _LATE)

            async def reset(securities: list[str]) -> float:
                jobs = await corrected(securities)
                return await timed(_give_and_drain(worker, jobs))

            async def right(securities: list[str], valuations: int) -> float:
                jobs = await corrected(securities)
                return await timed(_until_right(worker, jobs, pool, valuations))

            async def giant_reset() -> float:
                seconds = await reset(["GIANT"])
                await _as_before(pool)
                return holders / seconds

            async def many_reset() -> float:
                seconds = await reset(many)
                await _as_before(pool)
                return holders / seconds

            async def plain_reset() -> float:
                seconds = await timed(pool.execute(_PLAIN_RESET, "GIANT", _LATE))
                await _as_before(pool)
                return holders / seconds

            async def giant_right(valuations: int = 2) -> float:
                seconds = await right(["GIANT"], valuations)
                await _as_before(pool)
                return holders / seconds

            async def many_right() -> float:
                seconds = await right(many, 2)
                await _as_before(pool)
                return holders / seconds

            async def plain_right() -> float:
                await corrected(["GIANT"])
                seconds = await timed(pool.execute(_PLAIN_RECOMPUTATION, "GIANT", _LATE))
                await _as_before(pool)
                return holders / seconds

            size = f"{holders:,} holders"
            await bench.compare(
                f"reset, {size}", "keys/s", giant_reset, ("plain UPDATE", plain_reset),
                wanted=0.7, rounds=bench.size(4, 2) * bench.rounds,
            )  # fmt: skip
            for valuations in (1, 2):
                await bench.compare(
                    f"books right, {size}, 15 dates late, {valuations} `books`", "keys/s",
                    partial(giant_right, valuations), ("one recomputation in SQL", plain_right), wanted=0.5,
                )  # fmt: skip
            await bench.compare(
                f"reset, {len(many):,} securities x 10", "keys/s", many_reset, ("one security", giant_reset), wanted=0.5
            )
            await bench.compare(
                f"books right, {len(many):,} securities x 10, 2 `books`", "keys/s", many_right,
                ("one security", giant_right), wanted=0.5,
            )  # fmt: skip


async def _give_and_drain(worker: HerdWorker, jobs: list[Job]) -> None:
    for first in range(0, len(jobs), 5_000):  # as the topic delivers them
        await worker.give(0, jobs[first : first + 5_000])
    await worker.drained()


async def _until_right(worker: HerdWorker, jobs: list[Job], pool: asyncpg.Pool, valuations: int) -> None:
    """Resets and valuations run side by side, as they do in their own processes."""
    resetting = asyncio.create_task(_give_and_drain(worker, jobs))

    async def value() -> None:
        valuation = Valuation(pool, 2_000)
        left = "select exists (select from corrections where right_at is null)"
        while not resetting.done() or await pool.fetchval(left):
            if not (await valuation.pass_once()).keys:
                await asyncio.sleep(0.005)

    await asyncio.gather(resetting, *(value() for _ in range(valuations)))


async def _table_size(bench: Bench) -> None:
    """A correction of 1,000 keys in a large table and in a small one, in turn."""
    large = bench.size(1_000_000, 20_000)
    async with _corrected_among(bench, 10_000) as small_right, _corrected_among(bench, large) as large_right:
        for _ in range(bench.size(_SETTLING, 1)):
            await small_right()
            await large_right()
        await bench.compare(
            f"1,000 keys of {large:,} right", "keys/s", large_right, ("the same of 10,000", small_right),
            wanted=1 / 1.3, rounds=bench.size(4, 2) * bench.rounds,
        )  # fmt: skip


@asynccontextmanager
async def _corrected_among(bench: Bench, others: int) -> AsyncIterator[Work]:
    """Corrects 1,000 keys of a security in a table of so many others."""
    async with _books(bench) as (dsn, pool):
        bench.say(f"herd: loading {others:,} keys")
        await load(pool, ["TARGET"], 1_000, dates=_DATES)
        await load(pool, [f"O{n:05}" for n in range(others // 1_000)], 1_000, dates=_DATES, snapshots=False)
        await pool.execute("vacuum analyze")
        async with _worker(dsn, "size") as worker:
            price = 30

            async def right() -> float:
                nonlocal price
                price += 1
                await pool.execute(
                    "update market_prices set price = $1 where security_id = 'TARGET' and price_date = $2",
                    price, _LATE,
                )  # fmt: skip
                jobs = await issue(pool, ["TARGET"], _LATE)
                return 1_000 / await timed(_until_right(worker, jobs, pool, 1))

            yield right


async def _rates(bench: Bench) -> None:
    """Keys per second against the rate set, with one worker and with three."""
    seconds = bench.size(5, 1)
    for rate in (10_000,) if bench.quick else (1_000, 10_000, 50_000):
        for workers in (3,) if bench.quick else (1, 3):
            async with _books(bench) as (dsn, pool):
                await load(
                    pool, [f"R{n}" for n in range(3)], rate * (seconds + 3) // 3 + rate, dates=2, snapshots=False
                )
                await pool.execute("vacuum analyze position_state")
                measured = await _measured_rate(dsn, pool, rate, workers, seconds)
                name = f"rate set to {rate:,}, {workers} worker{'s' if workers > 1 else ''}"
                note = "wanted: 0.95 to 1.05"
                bench.add(Result(name, "keys/s", [measured], "set", [float(rate)], 1.0, note, aim=True))


async def _measured_rate(dsn: str, pool: asyncpg.Pool, rate: int, workers: int, seconds: int) -> float:
    running = [herd_worker(dsn, Path(tempfile.gettempdir()), group=f"rate{n}") for n in range(workers)]
    async with running[0] as first:
        others = [await other.__aenter__() for other in running[1:]]
        async with pool.acquire() as connection:
            await operations.throttle(connection, "bench", rate)
        for worker, security in zip([first, *others] * 3, ("R0", "R1", "R2"), strict=False):
            await worker.give(0, await issue(pool, [security], date(2025, 1, 2)))
        await until(pool, "select coalesce(sum(keys_done), 0) > 0 from reprocessing_jobs")
        await asyncio.sleep(1)  # past the slack of the first moment
        before, started = await _keys_done(pool), time.perf_counter()
        await asyncio.sleep(seconds)
        measured = (await _keys_done(pool) - before) / (time.perf_counter() - started)
        for other in running[1:]:
            await other.__aexit__(None, None, None)
        return measured


async def _keys_done(pool: asyncpg.Pool) -> int:
    return await pool.fetchval("select sum(keys_done)::bigint from reprocessing_jobs")


async def _live_traffic(bench: Bench) -> None:
    """Latency of live transactions on keys that are being reset without a limit; how soon a pause is in force."""
    holders = bench.size(200_000, 20_000)
    async with _books(bench) as (dsn, pool):
        bench.say(f"herd: loading {holders:,} keys")
        await load(pool, ["LIVE"], holders, dates=2, snapshots=False)
        await pool.execute("vacuum analyze position_state")
        async with _worker(dsn, "live", reset_rows_per_second=1e9) as worker:
            stop = asyncio.Event()
            live = [asyncio.create_task(_live(pool, holders, stop, seed)) for seed in range(2)]
            for _ in range(bench.size(5, 2)):
                await worker.give(0, await issue(pool, ["LIVE"], date(2025, 1, 2)))
                await worker.drained()
            stop.set()
            latencies = sorted(seconds for found in await asyncio.gather(*live) for seconds in found)
            p99 = percentile(99, latencies)
            target = worker.settings.reset_chunk_target_ms
            bench.add(
                Result(
                    "live transactions during a herd, p99", "1/s", [1 / p99], "one chunk's target",
                    [1_000 / target], 0.5,
                    f"{len(latencies):,} transactions: p50 {statistics.median(latencies) * 1000:.1f} ms, "
                    f"p99 {p99 * 1000:.1f} ms, worst {latencies[-1] * 1000:.1f} ms",
                    aim=True,
                )
            )  # fmt: skip
            await _pause_latency(bench, pool, worker)


async def _live(pool: asyncpg.Pool, holders: int, stop: asyncio.Event, seed: int) -> list[float]:
    """What an append does to a key: lock it and write it, one key a transaction."""
    latencies, number = [], seed
    while not stop.is_set():
        number = (number * 7919 + 104_729) % holders
        key = f"P{number + 1:07}"
        started = time.perf_counter()
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "select from position_state where security_id = 'LIVE' and portfolio_id = $1 for no key update", key
            )
            await connection.execute(
                "update position_state set epoch = epoch where security_id = 'LIVE' and portfolio_id = $1", key
            )
        latencies.append(time.perf_counter() - started)
        await asyncio.sleep(0.001)
    return latencies


async def _pause_latency(bench: Bench, pool: asyncpg.Pool, worker: HerdWorker) -> None:
    figures = []
    for _ in range(bench.size(3, 1)):
        async with pool.acquire() as connection:
            await operations.throttle(connection, "bench", 20_000)
            await worker.give(0, await issue(pool, ["LIVE"], date(2025, 1, 2)))
            await until(
                pool, "select coalesce(max(keys_done), 0) > 0 from reprocessing_jobs where status = 'PROCESSING'"
            )
            await operations.pause(connection, "bench", 1)
            paused, last, seen = time.perf_counter(), 0.0, await _keys_done(pool)
            while time.perf_counter() - paused < 1.5:
                await asyncio.sleep(0.01)
                if (now := await _keys_done(pool)) != seen:
                    seen, last = now, time.perf_counter() - paused
            figures.append(last)
            await operations.throttle(connection, "bench", 1e9)
            await operations.resume(connection, "bench", 1)
        await worker.drained()
    slowest = max(figures)
    bench.add(
        Result("pause in force", "1/s", [1 / max(slowest, 0.001)], "within a second", [1.0], 1.0,
               f"the last chunk ended {slowest * 1000:.0f} ms after the pause", aim=True)
    )  # fmt: skip


async def _intake(bench: Bench) -> None:
    """The late price itself, on a security with many holders and on one with few."""
    holders = bench.size(100_000, 5_000)
    async with _books(bench) as (_, pool):
        await load(pool, ["MANY"], holders, dates=_DATES, snapshots=False)
        await load(pool, ["FEW"], 10, dates=_DATES, snapshots=False)
        async with pool.acquire() as connection:
            await set_first_value(connection, 1.0)
        value = 100

        async def late(security: str) -> float:
            nonlocal value
            started, count = time.perf_counter(), bench.size(300, 100)
            for _ in range(count):
                value += 1
                async with pool.acquire() as connection, connection.transaction():
                    await prices.apply(connection, [Price(security, _LATE, Decimal(value))])
            return count / (time.perf_counter() - started)

        many: Callable[[], Awaitable[float]] = lambda: late("MANY")  # noqa: E731
        await bench.compare(
            f"a late price, {holders:,} holders", "prices/s", many, ("10 holders", lambda: late("FEW")), wanted=1.0
        )
