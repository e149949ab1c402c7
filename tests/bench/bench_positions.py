"""The position sink: appends and corrections per second, each beside bare SQL that does the same writes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
import msgspec

from sinks import positions
from sinks.database import connect
from sinks.model import Transaction
from tests.bench.harness import Bench, timed

_START = datetime(2020, 1, 1, tzinfo=UTC)
_TRANSACTION = (
    "transaction_id, portfolio_id, security_id, transaction_date, transaction_type, quantity, price, "
    "gross_transaction_amount, trade_fee, currency, revision, cancelled"
)


async def run(bench: Bench) -> None:
    """Appends over many keys and on one long one; corrections by depth."""
    await _appends_over_many_keys(bench)
    await _long_history(bench)


def trade(number: int, key: int, kind: str = "BUY", quantity: int = 5) -> Transaction:
    """The number-th of the key, a minute after the one before."""
    at = _START + timedelta(minutes=number)
    amount = Decimal(quantity * 10 + number % 7)
    return Transaction(
        f"t{key:07d}-{number:08d}", f"P{key:07d}", f"S{key % 100:03d}", at, kind, Decimal(quantity), Decimal(10), amount
    )  # type: ignore[arg-type]


async def book(connection: asyncpg.Connection, batch: Sequence[Transaction]) -> None:
    async with connection.transaction():
        await positions.apply(connection, list(enumerate(batch)), "FIFO")


# -- appends over many keys ---------------------------------------------------------------------------------------

_BARE_APPEND = (
    f"insert into transactions ({_TRANSACTION}) select * from unnest($1::transactions[])",
    "insert into position_history select * from unnest($1::position_history[])",
    "insert into outbox_events (topic, message_key, value) "
    "select 'transactions-processed', key, value from unnest($1::bytea[], $2::bytea[]) as e (key, value)",
)


async def _appends_over_many_keys(bench: Bench) -> None:
    """1,000 transactions on 1,000 keys in a batch, every fifth a disposal; the bare writes are those of the sink."""
    keys, batches = 1_000, bench.size(20, 3)
    number = 0
    async with bench.database() as dsn, bench.database() as bare_dsn:
        connection, bare = await connect(dsn), await connect(bare_dsn)
        try:
            await book(connection, [trade(0, key) for key in range(keys)])

            async def engine() -> float:
                nonlocal number
                work = []
                for _ in range(batches):
                    number += 1
                    kind, quantity = ("SELL", 7) if number % 5 == 0 else ("BUY", 5)
                    work.append([trade(number, key, kind, quantity) for key in range(keys)])
                seconds = sum([await timed(book(connection, batch)) for batch in work])
                return batches * keys / seconds

            async def bare_sql() -> float:
                """What the engine wrote last, written again elsewhere: all values are there, nothing is decided."""
                seconds = 0.0
                for back in range(batches):
                    wanted = number - back
                    history = await connection.fetch("select h from position_history h where sequence = $1", wanted + 1)
                    stored = await connection.fetch(
                        "select t from transactions t where transaction_id like $1", f"%-{wanted:08d}"
                    )
                    events = await connection.fetch(
                        "select message_key, value from outbox_events order by id desc offset $1 limit $2",
                        back * keys, keys,
                    )  # fmt: skip
                    await bare.execute("truncate transactions, position_history, outbox_events")
                    arguments = (
                        ([tuple(row[0]) for row in stored],),
                        ([tuple(row[0]) for row in history],),
                        ([row[0] for row in events], [row[1] for row in events]),
                    )
                    seconds += await timed(_transaction(bare, arguments))
                return batches * keys / seconds

            await engine()
            await bench.compare(
                "append, 1,000 keys a batch", "transactions/s", engine, ("bare inserts", bare_sql), wanted=0.3
            )
        finally:
            await connection.close()
            await bare.close()


async def _transaction(bare: asyncpg.Connection, arguments: Sequence[tuple[object, ...]]) -> None:
    async with bare.transaction():
        for sql, values in zip(_BARE_APPEND, arguments, strict=True):
            await bare.execute(sql, *values)


# -- one long history ---------------------------------------------------------------------------------------------

# The writes of a correction `depth` from the end, by set-based SQL that computes nothing: rows are superseded and
# written again under the next epoch, the marker and the replay are queued, the key and its security are updated.
_BARE_CORRECTION = (
    "update transactions set quantity = quantity where transaction_id = $1",
    """
    update position_history set superseded_at = clock_timestamp(), superseded_epoch = $3
    where security_id = $1 and portfolio_id = $2 and superseded_epoch is null and sequence > $4
    """,
    """
    insert into position_history (
        security_id, portfolio_id, epoch, sequence, transaction_id, position_date, quantity, cost_basis,
        realized_gain_loss, transaction_date, exact_quantity, exact_cost_basis, exact_realized, head_sequence,
        head_quantity, head_cost, lot_quantity, lot_cost, split_ratio)
    select security_id, portfolio_id, $3, sequence, transaction_id, position_date, quantity, cost_basis,
           realized_gain_loss, transaction_date, exact_quantity, exact_cost_basis, exact_realized, head_sequence,
           head_quantity, head_cost, lot_quantity, lot_cost, split_ratio
    from position_history
    where security_id = $1 and portfolio_id = $2 and superseded_epoch = $3 and sequence > $4
    """,
)


async def _long_history(bench: Bench) -> None:
    length = bench.size(100_000, 10_000)
    async with bench.database() as dsn:
        connection = await connect(dsn)
        try:
            bench.say(f"a key of {length:,} transactions")
            for first in range(0, length, 10_000):
                await book(connection, [trade(n, 1) for n in range(first, first + min(10_000, length))])
            await book(connection, [trade(n, 2) for n in range(10)])
            await connection.execute("delete from outbox_events")
            await connection.execute("analyze")
            await _appends_to_one_key(bench, connection, length)
            for depth in (10, 1_000, length):
                await _corrections(bench, connection, length, depth)
        finally:
            await connection.close()


async def _appends_to_one_key(bench: Bench, connection: asyncpg.Connection, length: int) -> None:
    """One transaction a batch, every other a disposal over two lots: at the end of the long history, and of 10."""
    appended = bench.size(200, 50)
    numbers = {1: length, 2: 10}

    async def append(key: int) -> float:
        first = numbers[key]
        numbers[key] += appended
        work = [trade(n, key, *(("SELL", 6) if n % 2 else ("BUY", 5))) for n in range(first, first + appended)]

        async def all_of_them() -> None:
            for transaction in work:
                await book(connection, [transaction])

        return appended / await timed(all_of_them())

    await bench.compare(
        f"append, to {length:,} transactions", "transactions/s", lambda: append(1),
        ("to 10 transactions", lambda: append(2)), wanted=0.9,
    )  # fmt: skip


async def _corrections(bench: Bench, connection: asyncpg.Connection, length: int, depth: int) -> None:
    """An amendment `depth` from the end of the long history; baseline: the same rows written by bare SQL."""
    repeated = {10: bench.size(40, 10), 1_000: bench.size(10, 3)}.get(depth, 1)
    key, revision = 1, 0

    async def state() -> tuple[int, int]:
        row = await connection.fetchrow(
            "select s.epoch, (select max(sequence) from position_history h where h.security_id = s.security_id"
            " and h.portfolio_id = s.portfolio_id and superseded_epoch is null) as count"
            " from position_state s where portfolio_id = $1", trade(0, key).portfolio_id,
        )  # fmt: skip
        return row["epoch"], row["count"]

    async def tidy() -> None:
        await connection.execute("delete from position_history where superseded_epoch is not null")
        await connection.execute("delete from outbox_events")
        await connection.execute("vacuum analyze position_history")

    async def engine() -> float:
        nonlocal revision
        _, count = await state()
        seconds = 0.0
        for _ in range(repeated):
            revision += 1
            before = trade(count - depth, key)
            stored = await connection.fetchrow(
                f"select {_TRANSACTION} from transactions where transaction_id = $1", before.transaction_id
            )
            amended = msgspec.structs.replace(
                Transaction(*stored.values()),
                revision=stored["revision"] + 1,
                gross_transaction_amount=Decimal(revision),
            )
            seconds += await timed(book(connection, [amended]))
        await tidy()
        return repeated / seconds

    async def bare_sql() -> float:
        seconds = 0.0
        for _ in range(repeated):
            epoch, count = await state()
            seconds += await timed(_bare_correction(connection, key, epoch + 1, count, depth))
        await tidy()
        return repeated / seconds

    await bench.compare(
        f"correction, {depth:,} deep of {length:,}", "corrections/s", engine, ("bare SQL", bare_sql), wanted=0.2,
        rounds=min(bench.rounds, 3) if depth == length else None, note=f"replay of {length:,} queued as one row",
    )  # fmt: skip


async def _bare_correction(connection: asyncpg.Connection, key: int, epoch: int, count: int, depth: int) -> None:
    one = trade(count - depth, key)
    kept = count - depth
    names = (one.security_id, one.portfolio_id)
    async with connection.transaction():
        await connection.execute(_BARE_CORRECTION[0], one.transaction_id)
        await connection.execute(_BARE_CORRECTION[1], *names, epoch, kept)
        await connection.execute(_BARE_CORRECTION[2], *names, epoch, kept)
        await connection.execute(
            "insert into outbox_events (topic, message_key, value) values ('t', 'k', 'marker'), ('t', 'k', 'replay')"
        )
        await connection.execute("select count(nextval('outbox_events_id_seq')) from generate_series(1, $1)", count)
        await connection.execute(
            "update position_state set epoch = $3 where security_id = $1 and portfolio_id = $2", *names, epoch
        )
        await connection.execute(
            "insert into corrections (seq, security_id, earliest_date, reason, reset_at)"
            " values (nextval('correction_seq'), $1, '2020-01-01', 'transaction', now())", one.security_id,
        )  # fmt: skip
        await connection.execute(
            "update securities set valued_through = valued_through where security_id = $1", names[0]
        )
