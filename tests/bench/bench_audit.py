"""How long an audit takes, and how much memory, beside a plain scan of the same rows by the same client library.

The books are made by the sinks themselves. A third of the keys trade several times.
"""

from __future__ import annotations

import random
import resource
import time
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from sinks import calendar, positions, prices
from sinks.database import Pool, connect, connect_pool
from sinks.model import Price, Transaction
from sinks.valuation import Valuation
from tests.bench.harness import Bench
from tidemark.audit import audit_books

_DATES = 100
_BATCH = 5_000
_PROCESSES = 2
_SCAN = "select * from daily_position_snapshots order by security_id, portfolio_id, valuation_date"


async def run(bench: Bench) -> None:
    """Snapshots audited a second, in two processes."""
    snapshots = bench.size(1_000_000, 20_000)
    async with bench.database() as dsn:
        bench.say(f"audit: filling in {snapshots:,} snapshots")
        await _fill(dsn, snapshots // _DATES, securities=2)

        async def audit() -> float:
            started = time.perf_counter()
            result = await audit_books(dsn, "FIFO", processes=_PROCESSES)
            assert (result.snapshots > 0.9 * snapshots, result.differences, result.waiting) == (True, [], [])
            return result.snapshots / (time.perf_counter() - started)

        async def scan() -> float:
            started, rows = time.perf_counter(), 0
            connection = await connect(dsn)
            try:
                async with connection.transaction():
                    async for _ in connection.cursor(_SCAN, prefetch=25_000):
                        rows += 1
            finally:
                await connection.close()
            return rows / (time.perf_counter() - started)

        rounds = min(2, bench.rounds)
        result = await bench.compare(
            "audit",
            "snapshots/s",
            audit,
            ("plain scan in one process", scan),
            rounds=rounds,
            note=f"{snapshots:,} rows",
        )
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        bench.say(f"audit: {snapshots / result.median:.1f} s; largest process {largest:.0f} MiB")


async def _fill(dsn: str, keys: int, securities: int) -> None:
    """So many positions, of 100 business dates each."""
    chance = random.Random(1)
    days = [date(2025, 1, 1) + timedelta(days=n) for n in range(_DATES)]
    pool = await connect_pool(dsn, size=2)
    try:
        await _store_prices(pool, chance, days, securities)
        for first in range(0, keys, _BATCH):
            batch = [t for n in range(first, min(first + _BATCH, keys)) for t in _trades(chance, n, securities, days)]
            async with pool.acquire() as connection, connection.transaction():
                await positions.apply(connection, list(enumerate(batch)), "FIFO")
        async with pool.acquire() as connection, connection.transaction():
            await calendar.apply(connection, days)
        valuation = Valuation(pool, 2_000)
        while (await valuation.pass_once()).keys:
            pass
        async with pool.acquire() as connection:
            await connection.execute("delete from outbox_events")
            await connection.execute("vacuum analyze")
    finally:
        await pool.close()


async def _store_prices(pool: Pool, chance: random.Random, days: list[date], securities: int) -> None:
    quotes = [
        Price(f"S{number}", day, Decimal(chance.randint(1_000, 2_000_000)) / 10_000)
        for number in range(securities)
        for day in days
        if chance.random() < 0.9
    ]
    async with pool.acquire() as connection, connection.transaction():
        await prices.apply(connection, quotes)


def _trades(chance: random.Random, number: int, securities: int, days: list[date]) -> list[Transaction]:
    kinds = ["BUY"] if number % 3 else ["BUY", "BUY", "SELL", "SPLIT", "SELL"]
    last, security = 0, f"S{number % securities}"
    trades = []
    for place, kind in enumerate(kinds):
        quantity = Decimal(2) if kind == "SPLIT" else Decimal(chance.randint(1_000, 99_999)) / 100
        at = Decimal(chance.randint(1_000, 999_999)) / 1_000
        moment = datetime.combine(days[last], datetime.min.time(), UTC) + timedelta(hours=place)
        trades.append(
            Transaction(
                f"T{number}-{place}", f"P{number}", security, moment, kind, quantity, at, quantity * at,
                Decimal(place),
            )
        )  # fmt: skip
        last = min(last + chance.randint(0, 20), _DATES - 1)
    return trades
