"""Prices from Kafka into Postgres, exactly once, by one `intake` worker.

Beside it the same rows from a plain loop that has no Kafka, and Quix Streams with its own Postgres sink, which is at
least once.
"""

from __future__ import annotations

import json

from sinks import prices
from sinks.database import Connection, open_connection
from streams.records import decode_price
from streams.topics import PRICES
from tests.bench.bench_consume import Peers, price, send_prices
from tests.bench.harness import Bench, Work, timed
from tests.bench.intake import through_intake
from tests.bench.peers.run import PEERS

_BATCH = 5_000


async def run(bench: Bench) -> None:
    """Both comparisons on one topic; the tables are emptied before each round."""
    count = bench.size(300_000, 30_000)
    async with bench.database() as dsn, open_connection(dsn) as connection:
        settings = await bench.settings(dsn, batch_records=_BATCH)
        send_prices(settings, count)
        rows = [decode_price(json.dumps(price(number)).encode()) for number in range(count)]
        name = "prices into Postgres, exactly once"

        async def ours() -> float:
            await _empty(connection)
            return await through_intake(settings, connection, PRICES, count)

        async def plain() -> float:
            await _empty(connection)

            async def loop() -> None:
                for start in range(0, count, _BATCH):
                    async with connection.transaction():
                        await prices.apply(connection, rows[start : start + _BATCH])

            return count / await timed(loop())

        others: list[tuple[str, Work, float]] = [("the same statements, no Kafka", plain, 0.8)]
        if not (PEERS / ".installed").exists():
            bench.say("Quix Streams is left out: run `make peers`")
            await bench.compare_with_each(name, "rows/s", ours, others)
            return
        await connection.execute(
            "create table public.quix_prices (security_id text, price_date date, price numeric, currency text, "
            "revision bigint, primary key (security_id, price_date))"
        )
        quix = Peers(bench, settings).rate("quix_postgres", count, database_url=dsn, table="quix_prices", batch=_BATCH)

        async def theirs() -> float:
            await connection.execute("truncate public.quix_prices")
            rate: float = await quix()
            return rate

        others.append(("Quix Streams and its Postgres sink", theirs, 2))
        await bench.compare_with_each(name, "rows/s", ours, others)


async def _empty(connection: Connection) -> None:
    await connection.execute("truncate market_prices")
    await connection.execute("checkpoint")
