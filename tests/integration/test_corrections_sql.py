"""The correcting transaction on a real Postgres: all or nothing, few statements, and no more work than what changes."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from sinks import database as database_module
from sinks import outbox, positions
from sinks.batches import Batch
from sinks.database import Pool, connect_pool, migrate
from sinks.model import CostBasisMethod, Transaction
from sinks.offsets import Offsets
from streams.records import decode_transaction
from tests import scenarios
from tests.gate import open_gate
from tidemark.audit import audit_books

START = datetime(2025, 1, 6, 9, tzinfo=UTC)
TP = ("transactions", 0)


def trade(
    number: int, kind: str, quantity: object, amount: object, portfolio: str = "P", *, minute: int = -1, **more: Any
) -> Transaction:
    """Transaction `number`, a minute after the one before unless another minute is given."""
    at = START + timedelta(minutes=number if minute < 0 else minute)
    return Transaction(
        f"t{number:07d}", portfolio, more.pop("security", "S"), at, kind, Decimal(str(quantity)), Decimal(0),
        Decimal(str(amount)), **more,
    )  # fmt: skip


async def book(pool: Pool, batch: Sequence[Transaction], **options: Any) -> positions.PositionOutcome:
    method: CostBasisMethod = options.pop("method", "FIFO")
    async with pool.acquire() as connection, connection.transaction():
        return await positions.apply(connection, list(enumerate(batch)), method, **options)


class Cut(Exception):  # noqa: N818
    """The fault."""


class Failing:
    """A connection on which the n-th statement of the effect is executed, and then everything ends."""

    def __init__(self, connection: Any, fail_at: int) -> None:
        self._connection = connection
        self._left = fail_at
        self.done = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._connection, name)
        if name not in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
            return method

        async def call(*arguments: Any) -> Any:
            result = await method(*arguments)
            self.done += 1
            self._left -= 1
            if self._left == 0:
                raise Cut
            return result

        return call


@dataclass(frozen=True)
class Sent:
    offset: int
    key: bytes | None = None
    value: bytes | None = None


async def everything(pool: Pool) -> dict[str, list[str]]:
    """Every row of every table, as text."""
    tables = await pool.fetch("select table_name from information_schema.tables where table_schema = 'tidemark'"
                              " and table_type = 'BASE TABLE' order by 1")  # fmt: skip
    return {
        row[0]: sorted(found[0] for found in await pool.fetch(f'select t::text from "{row[0]}" t')) for row in tables
    }


@pytest.mark.parametrize("replay_rows", [1_000, 3])
async def test_an_error_at_any_statement_leaves_no_trace(pool: Pool, replay_rows: int) -> None:
    """An amendment, a cancellation, a move, a late trade that consumes stored lots, a new key and an append at once."""

    async def get() -> Pool:
        return pool

    offsets = Offsets(get, "intake", lambda: False)
    claim = (await offsets.claim({TP: 0}))[TP]
    history = [trade(n, "BUY", 10, 100 + n) for n in range(20)]
    history += [trade(n, "BUY", 10, 100, "Q") for n in range(20, 30)] + [trade(30, "BUY", 5, 5, "R")]
    await book(pool, history)
    await pool.execute("insert into business_dates values ('2025-01-06'), ('2025-01-07')")
    await pool.execute("update position_state set watermark_date = '2025-01-07'")
    await pool.execute("update securities set valued_through = '2025-01-07'")
    correction = [
        trade(3, "BUY", 11, 100, revision=1),
        trade(5, "BUY", 10, 105, revision=1, cancelled=True),
        trade(25, "BUY", 10, 100, revision=1),
        trade(40, "SELL", 45, 900, minute=15),
        trade(41, "BUY", 1, 1, "NEW"),
        trade(42, "SELL", 1, 1, "R", minute=60 * 24 * 3),
    ]
    clean = await everything(pool)
    fail_at, statements = 1, 0

    async def effect(connection: asyncpg.Connection, records: Sequence[Any]) -> None:
        nonlocal statements
        failing = Failing(connection, fail_at)
        await positions.apply(failing, list(enumerate(correction)), "FIFO", replay_rows)  # type: ignore[arg-type]
        statements = failing.done

    async def refuse(connection: asyncpg.Connection, record: Any, detail: str) -> None:
        raise AssertionError(detail)

    batch = Batch(*TP, claim.epoch, 0, [Sent(n) for n in range(6)])
    while not statements:
        try:
            await offsets.apply(batch, effect, refuse)
        except Cut:
            assert await everything(pool) == clean, f"after statement {fail_at}"
            fail_at += 1
    assert fail_at == statements + 1 > 18
    after = await everything(pool)
    changed = {table for table in after if after[table] != clean[table]}
    assert changed == {"corrections", "kafka_offsets", "outbox_events", "position_history", "position_state",
                       "securities", "transactions"}  # fmt: skip
    states = await pool.fetch("select portfolio_id, epoch from position_state order by 1")
    assert [tuple(row) for row in states] == [("NEW", 0), ("P", 1), ("Q", 1), ("R", 0)]


async def statements(connection: asyncpg.Connection, batch: Sequence[Transaction], **options: Any) -> list[str]:
    """What the batch sends to Postgres; asyncpg's own questions about types apart."""
    seen: list[str] = []
    with connection.query_logger(lambda query: seen.append(query.query.strip())):
        async with connection.transaction():
            await positions.apply(connection, list(enumerate(batch)), "FIFO", **options)
    return [query for query in seen if "pg_catalog" not in query and "'jit'" not in query]


def on_keys(keys: int, number: int, kind: str, quantity: int, *, minute: int = -1, **more: Any) -> list[Transaction]:
    at = number if minute < 0 else minute
    return [
        trade(number + 10 * key, kind, quantity, 10 * quantity, f"P{key}", security=f"S{key}", minute=at, **more)
        for key in range(keys)
    ]


async def test_a_batch_is_a_handful_of_statements_however_many_keys(pool: Pool, database: str) -> None:
    """New keys, appends, disposals over several lots, amendments: each as one batch over 10 keys, and over 1,000."""
    sent: dict[int, list[list[str]]] = {}
    for keys in (10, 1_000):
        await pool.execute("truncate transactions, position_history, position_state, outbox_events, securities")
        batches: list[list[Transaction]] = [
            on_keys(keys, 0, "BUY", 5),
            on_keys(keys, 1, "BUY", 5) + on_keys(keys, 2, "BUY", 5),
            on_keys(keys, 3, "SELL", 12),
            on_keys(keys, 1, "BUY", 6, revision=1),
            on_keys(keys, 4, "SELL", 2, minute=0),
        ]
        async with pool.acquire() as connection:
            sent[keys] = [await statements(connection, batch) for batch in batches]
            amended = on_keys(keys, 2, "BUY", 6, revision=1)
            sent[keys].append(await statements(connection, amended, replay_rows=keys * 4))
    print([len(queries) for queries in sent[1_000]])
    assert sent[10] == sent[1_000]
    assert max(map(len, sent[1_000])) < 25
    audit = await audit_books(database, "FIFO")
    assert (audit.differences, audit.keys) == ([], 1_000)


_TOUCHED = """
select relname, seq_tup_read + coalesce(idx_tup_fetch, 0) + n_tup_ins + n_tup_upd + n_tup_del as touched
from pg_stat_xact_user_tables where schemaname = 'tidemark'
"""


async def rows_touched(pool: Pool, batch: Sequence[Transaction], **options: Any) -> Counter[str]:
    """Rows that the batch reads or writes, by table."""
    async with pool.acquire() as connection, connection.transaction():
        before = Counter(dict(await connection.fetch(_TOUCHED)))
        await positions.apply(connection, list(enumerate(batch)), "FIFO", **options)
        return Counter(dict(await connection.fetch(_TOUCHED))) - before


async def test_a_long_history_costs_what_changes(pool: Pool, database: str) -> None:
    """The same changes at the end of 40 transactions and of 20,000 touch the same number of rows."""
    long, short = 20_000, 40
    for portfolio, count in (("LONG", long), ("SHORT", short)):
        batch = [
            trade(n, "SPLIT" if n == count // 2 else "BUY", 2, 10 + n % 7, portfolio, security=portfolio)
            for n in range(count)
        ]
        ids = {t.transaction_id: f"{portfolio}{t.transaction_id}" for t in batch}
        await book(pool, [_renamed(t, ids) for t in batch], replay_rows=0)
    await pool.execute("analyze")
    steps: list[list[tuple[int, str, int]]] = [
        [(0, "BUY", 1)],  # appended: numbers count from the end
        [(1, "SELL", 7)],  # takes the lots of four transactions at the other end
        [(2, "BUY", 1), (3, "SELL", 9), (-10, "BUY", 3)],  # two appended, one ten before the end
        [(-12, "SELL", 8)],
    ]
    for number, step in enumerate(steps):
        touched = []
        for portfolio, count in (("LONG", long), ("SHORT", short)):
            batch = [
                trade(900 + 100 * number + place, kind, quantity, 5, portfolio, minute=count + at, security=portfolio)
                for place, (at, kind, quantity) in enumerate(step)
            ]
            ids = {t.transaction_id: f"{portfolio}x{t.transaction_id}" for t in batch}
            touched.append(await rows_touched(pool, [_renamed(t, ids) for t in batch], replay_rows=0))
        print(number, *touched)
        for table in ("position_history", "transactions", "outbox_events"):
            assert touched[0][table] <= touched[1][table] + 5, (number, table)
    audit = await audit_books(database, "FIFO")
    assert (audit.differences, audit.keys) == ([], 2)


def _renamed(t: Transaction, ids: dict[str, str]) -> Transaction:
    import msgspec

    return msgspec.structs.replace(t, transaction_id=ids[t.transaction_id])


async def test_a_history_from_before_cost_states_is_computed_at_its_next_change(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written under the first schema, then upgraded."""
    every = database_module.migrations()
    monkeypatch.setattr(database_module, "migrations", lambda: every[:1])
    await migrate(empty_database)
    pool = await connect_pool(empty_database)
    try:
        old = [trade(n, "BUY", 3, 7) for n in range(6)] + [trade(n, "BUY", 3, 7, "Q") for n in range(6, 9)]
        for sequence, t in enumerate(old, 1):
            place = sequence if t.portfolio_id == "P" else sequence - 6
            await pool.execute(
                "insert into transactions values ($1, $2, $3, $4, $5, $6, $7, $8, 0, 'USD', 0, false)",
                t.transaction_id, t.portfolio_id, t.security_id, t.transaction_date, t.transaction_type, t.quantity,
                t.price, t.gross_transaction_amount,
            )  # fmt: skip
            await pool.execute(
                "insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id,"
                " position_date, quantity, cost_basis, realized_gain_loss) values ($1, $2, 0, $3, $4, $5, $6, $7, 0)",
                t.security_id, t.portfolio_id, place, t.transaction_id, t.position_date, 3 * place, 7 * place,
            )  # fmt: skip
        await pool.execute("insert into position_state (security_id, portfolio_id, watermark_date)"
                           " values ('S', 'P', '2025-01-05'), ('S', 'Q', '2025-01-05')")  # fmt: skip
        monkeypatch.undo()
        assert "0003_positions" in await migrate(empty_database)
        await open_gate(empty_database)
        assert (await audit_books(empty_database, "FIFO")).differences == []
        await book(pool, [trade(20, "SELL", 4, 20), trade(21, "SELL", 4, 20, "Q", minute=7)])
        audit = await audit_books(empty_database, "FIFO")
        assert (audit.differences, audit.history_rows) == ([], 11)
        assert [row[0] for row in await pool.fetch("select epoch from position_state")] == [1, 1]
        await book(pool, [trade(22, "SELL", 4, 20)])  # from here on an append is one
        assert await pool.fetchval("select epoch from position_state where portfolio_id = 'P'") == 1
    finally:
        await pool.close()


class Consumer:
    """Per key the highest epoch's transactions; ids that were passed are ignored (contract, transactions-processed)."""

    def __init__(self) -> None:
        self.passed: dict[bytes | None, int] = defaultdict(int)
        self.kept: dict[tuple[str, str], tuple[int, list[str]]] = defaultdict(lambda: (0, []))
        self.expected: dict[tuple[str, str], int] = {}

    def take(self, event: outbox.OutboxEvent) -> None:
        if event.id <= self.passed[event.key]:
            return
        self.passed[event.key] = event.id
        assert event.value is not None
        value = json.loads(event.value)
        key, epoch = (value["portfolio_id"], value["security_id"]), value["epoch"]
        if value["sequence"] == 0:
            assert epoch > self.kept[key][0]
            self.kept[key] = (epoch, [])
        else:
            assert (epoch, value["sequence"]) == (self.kept[key][0], len(self.kept[key][1]) + 1)
            self.kept[key][1].append(value["transaction_id"])


@pytest.mark.parametrize("replay_rows", [0, 6])
async def test_replays_that_the_relay_expands(
    pool: Pool, database: str, replay_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrections while replays are under way, and a broker that takes only a part of what it is sent."""
    monkeypatch.setattr(outbox, "_REPLAYED_AT_ONCE", 3)
    chance = random.Random(replay_rows)
    events = scenarios.generate(5, events=900)
    arrived = [decode_transaction(json.dumps(r).encode()) for topic, r in events if topic == "transactions"]
    chance.shuffle(arrived)
    consumer, pieces, abandoned, outdated = Consumer(), 0, 0, 0

    async def relay(part: float) -> bool:
        nonlocal pieces, abandoned, outdated
        async with pool.acquire() as connection:
            waiting = await connection.fetchval("select count(*) from outbox_events where replay is not null")
            window = await outbox.read(connection, 50, 2**20)
            read = window.events
            left = await connection.fetchval("select count(*) from outbox_events where replay is not null")
            abandoned += waiting - left
            pieces += sum(1 for event in read if event.replay)
            stopped: set[bytes | None] = set()
            acked = []
            for event in read:
                if event.key not in stopped and chance.random() < part:
                    consumer.take(event)
                    if chance.random() < 0.9:  # else: published, but the relay never learns
                        acked.append(event)
                        continue
                stopped.add(event.key)
            await outbox.acknowledge(connection, acked)
        outdated += window.outdated
        return bool(read or window.outdated)

    while arrived:
        size = chance.choice([1, 3, 20])
        await book(pool, arrived[:size], replay_rows=replay_rows)
        del arrived[:size]
        await relay(0.9)
    while await relay(0.95):
        pass
    assert pieces > 50
    assert outdated > abandoned > 3
    assert await pool.fetchval("select count(*) from outbox_events") == 0
    live: dict[tuple[str, str], tuple[int, list[str]]] = {
        (row["portfolio_id"], row["security_id"]): (row["epoch"], [])
        for row in await pool.fetch("select * from position_state")
    }
    for row in await pool.fetch("select * from position_history where superseded_epoch is null order by sequence"):
        live[row["portfolio_id"], row["security_id"]][1].append(row["transaction_id"])
    assert dict(consumer.kept) == live
    assert (await audit_books(database, "FIFO")).differences == []


async def test_the_ids_of_a_queued_replay_lie_between_those_before_and_after_it(pool: Pool) -> None:
    """Drawn with it, while other keys draw theirs: what the key gets meanwhile comes behind."""
    await book(pool, [trade(n, "BUY", 1, 1) for n in range(30)])
    await book(pool, [trade(3, "BUY", 2, 1, revision=1)], replay_rows=0)
    await book(pool, [trade(50, "BUY", 1, 1), trade(51, "BUY", 1, 1, "Q")])
    async with pool.acquire() as connection:
        first = (await outbox.read(connection, 100, 2**20)).events
        assert [event.sequence for event in first if event.key == b"P|S"] == [0] * 31 + list(range(1, 31))
        assert [event.key for event in first][-1] == b"Q|S"  # only the replayed key waits
        await outbox.acknowledge(connection, first)
        (last,) = (await outbox.read(connection, 100, 2**20)).events
    ids = [event.id for event in (*first, last) if event.key == b"P|S"]
    assert ids == sorted(set(ids))
    assert len(ids) == 30 + 1 + 30 + 1
