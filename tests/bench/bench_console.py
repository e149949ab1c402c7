"""The console beside large tables: how soon the overview answers, and what looking costs Postgres.

1,000,000 keys, 10,000 open corrections (quick: 50,000 and 1,000), one `triggers` worker, an open live stream and
a page load every half second. Two states: a tenth of the keys dirty, and every key due because a date has just closed.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import psutil

from deploy.local.stack import Stack
from sinks.database import connect
from streams.settings import load_named
from tests.bench.harness import Bench, Result, percentile

_FILL = """
insert into business_dates (business_date)
    select d::date from generate_series(date '2025-01-01', date '2025-01-31', '1 day') d;
insert into securities
    select 'S' || lpad(n::text, 5, '0'), case when n % 10 = 0 then date '2025-01-20' else date '2025-01-31' end
    from generate_series(1, {securities}) n;
insert into position_state (security_id, portfolio_id, watermark_date, status)
    select 'S' || lpad(n::text, 5, '0'), 'P' || p,
           case when n % 10 = 0 then date '2025-01-20' else date '2025-01-31' end,
           case when n % 10 = 0 then 'REPROCESSING' else 'CURRENT' end
    from generate_series(1, {securities}) n, generate_series(1, 100) p;
insert into corrections (seq, security_id, earliest_date, reason, reissue_at)
    select n, 'S' || lpad((1 + n % {securities})::text, 5, '0'), date '2025-01-21', 'price', 'infinity'
    from generate_series(1, {corrections}) n;
insert into reprocessing_jobs (job_id, security_id, earliest_impacted_date, seq, status, created_at, keys_total)
    select n, 'S' || lpad((1 + n % {securities})::text, 5, '0'), date '2025-01-21', n, 'PENDING', now(), 100
    from generate_series(1, {corrections}) n;
"""


async def run(bench: Bench) -> None:
    """Fill, look, let a date close, look again."""
    securities, corrections = bench.size(10_000, 500), bench.size(10_000, 1_000)
    async with bench.database() as dsn:
        connection = await connect(dsn)
        bench.say(f"filling {securities * 100:,} keys")
        await connection.execute(_FILL.format(securities=securities, corrections=corrections))
        await connection.execute("vacuum analyze")
        await connection.execute("checkpoint")
        folder = bench.folder / "console"
        settings = load_named(
            broker_url=await bench.kafka(), database_url=dsn, data_dir=folder, internal_partitions=2, input_partitions=2
        )
        stack = Stack(settings, roles=["triggers"])
        await stack.start()
        postmaster = psutil.Process(await connection.fetchval("select pg_backend_pid()")).parent()
        assert postmaster is not None
        try:
            url = stack.worker_url("triggers")
            await _look(bench, url, postmaster, "a tenth of the keys dirty", bench.size(60, 2))
            await connection.execute("insert into business_dates (business_date) values ('2025-02-03')")
            await _look(bench, url, postmaster, "every key due", bench.size(310, 2))
        finally:
            await stack.stop()
            await connection.close()


async def _look(bench: Bench, url: str, postmaster: psutil.Process, state: str, seconds: int) -> None:
    """Long enough for a count of all keys, which comes every 300 s; the first after a change comes twice."""
    bench.say(f"looking for {seconds} s: {state}")
    answers: list[float] = []
    async with aiohttp.ClientSession() as web:
        stream = asyncio.create_task(_follow(web, url))
        await asyncio.sleep(bench.size(5, 1))
        before, begun = _cpu(postmaster), time.monotonic()
        while time.monotonic() - begun < seconds:
            started = time.perf_counter()
            async with web.get(f"{url}/") as response:
                assert response.status == 200, await response.text()
                await response.read()
            answers.append((time.perf_counter() - started) * 1000)
            await asyncio.sleep(0.5)
        used = (_cpu(postmaster) - before) / (time.monotonic() - begun)
        stream.cancel()
    note = f"99 %: {percentile(99, answers):.0f} ms; wanted below 100"
    bench.add(Result(f"overview, median ({state})", "ms", answers, note=note, less=True))
    used_name, below = f"Postgres while looking ({state})", "wanted below 1"
    bench.add(Result(used_name, "% of a core", [100 * used], note=below, less=True))


async def _follow(web: aiohttp.ClientSession, url: str) -> None:
    async with web.get(f"{url}/events/overview", timeout=aiohttp.ClientTimeout()) as response:
        async for _ in response.content:
            pass


def _cpu(postmaster: psutil.Process) -> float:
    """Seconds that Postgres has used: its processes, and those that have ended."""
    own = postmaster.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in postmaster.children():
        times = child.cpu_times()
        total += times.user + times.system
    return total
