"""Transactions from Kafka into positions, exactly once, by one `intake` worker: the append path.

Beside it the rows that the worker wrote, written again by bare SQL: all values at hand, nothing is decided.
"""

from __future__ import annotations

import time

import msgspec

from sinks.database import Connection, open_connection
from streams.settings import Settings
from streams.topics import TRANSACTIONS
from tests.bench.bench_positions import trade
from tests.bench.harness import Bench
from tests.bench.intake import through_intake
from tests.bench.sending import send

_KEYS = 1_000
_BATCH = 5_000
_WRITTEN = ("transactions", "position_history", "outbox_events")
TABLES = (*_WRITTEN, "position_state", "securities")
"""What booking writes."""
_ORDER = {  # by time, and of no two rows alike: pages must not overlap
    "transactions": "transaction_date, transaction_id",
    "position_history": "sequence, transaction_id, epoch",
    "outbox_events": "id",
}

_AS_JSON = "select json_agg(r)::text from (select * from {table} order by {order} limit $1 offset $2) as r"
_INSERT = (
    "insert into {table} overriding system value select * from json_populate_recordset(null::{table}, $1::text::json)"
)


async def run(bench: Bench) -> None:
    """Every fifth transaction of a key is a disposal; tables are emptied before each round."""
    count = bench.size(60_000, 10_000)
    async with (
        bench.database() as dsn,
        bench.database() as bare_dsn,
        open_connection(dsn) as connection,
        open_connection(bare_dsn) as bare,
    ):
        settings = await bench.settings(dsn, batch_records=_BATCH)
        send_transactions(settings, count)

        async def ours() -> float:
            await empty(connection, *TABLES)
            return await through_intake(settings, connection, TRANSACTIONS, count)

        async def bare_sql() -> float:
            await empty(bare, *TABLES)
            return count / await _written_again(connection, bare, count)

        bench.say("transactions: a first round, so that there is something to write again")
        await ours()
        await bench.compare(
            "transactions into positions, exactly once",
            "transactions/s",
            ours,
            ("bare inserts of the same rows", bare_sql),
            wanted=0.6,
        )


async def empty(connection: Connection, *tables: str) -> None:
    """Before each round, so that all rounds begin alike."""
    await connection.execute(f"truncate {', '.join(tables)} cascade")
    await connection.execute("checkpoint")


async def _written_again(connection: Connection, bare: Connection, count: int) -> float:
    """Seconds to write all rows of the three tables, a batch a transaction; how they are sent costs next to nothing."""
    seconds = 0.0
    for start in range(0, count, _BATCH):
        found = {
            table: await connection.fetchval(_AS_JSON.format(table=table, order=_ORDER[table]), _BATCH, start)
            for table in _WRITTEN
        }
        began = time.perf_counter()
        async with bare.transaction():
            for table, rows in found.items():
                await bare.execute(_INSERT.format(table=table), rows)
        seconds += time.perf_counter() - began
    return seconds


def send_transactions(settings: Settings, count: int) -> int:
    """In the order in which they happened, spread over the partitions by their security; returns how many."""
    send(settings, TRANSACTIONS, (_record(*divmod(place, _KEYS)) for place in range(count)))
    return count


def _record(number: int, key: int) -> tuple[str, bytes]:
    transaction = trade(number, key, *(("SELL", 7) if number % 5 == 4 else ("BUY", 5)))
    return transaction.security_id, msgspec.json.encode(transaction)
