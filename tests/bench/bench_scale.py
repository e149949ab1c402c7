"""How what a topology takes in grows with the partitions of its topics and with its workers."""

from __future__ import annotations

from functools import partial

from sinks.database import Connection, open_connection
from streams.settings import Settings
from streams.topics import PRICES, TRANSACTIONS
from tests.bench.bench_consume import send_prices
from tests.bench.bench_transactions import TABLES, empty, send_transactions
from tests.bench.harness import Bench, Work
from tests.bench.intake import through_intake, through_ready_workers

_PARTITIONS = (4, 16)


async def run(bench: Bench) -> None:
    """Prices over more and more partitions, one worker; transactions by two workers beside one."""
    async with bench.database() as dsn, open_connection(dsn) as connection:
        await _by_partitions(bench, dsn, connection)
        if bench.quick:
            bench.say("scale: two workers are left out of a quick look")
        else:
            await _by_workers(bench, dsn, connection)


async def _by_partitions(bench: Bench, dsn: str, connection: Connection) -> None:
    count = bench.size(200_000, 30_000)

    async def of(partitions: int) -> Work:
        settings = await bench.settings(dsn, input_partitions=partitions)
        send_prices(settings, count)

        async def rate() -> float:
            await empty(connection, "market_prices")
            return await through_intake(settings, connection, PRICES, count)

        return rate

    one = await of(1)
    for partitions in _PARTITIONS[:1] if bench.quick else _PARTITIONS:
        await bench.compare(
            f"prices into Postgres from {partitions} partitions", "rows/s", await of(partitions), ("from one", one)
        )


async def _by_workers(bench: Bench, dsn: str, connection: Connection) -> None:
    count = bench.size(60_000, 10_000)
    settings: Settings = await bench.settings(dsn)

    async def rate(workers: int) -> float:
        await empty(connection, *TABLES)
        return await through_ready_workers(
            settings, connection, TRANSACTIONS, workers, partial(send_transactions, settings, count)
        )

    await bench.compare(
        "transactions into positions by two workers", "transactions/s", partial(rate, 2), ("by one", partial(rate, 1))
    )
