"""Histories cut into batches at every place, on a real Postgres: identical rows; what a split does to stored lots."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from decimal import Decimal
from random import Random
from typing import Any

import asyncpg
import pytest

from sinks import positions
from sinks.database import connect
from sinks.model import CostBasisMethod, Transaction
from tests.integration.test_positions_sql import JAN, book
from tidemark.audit import audit_books

KINDS = ["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT"]
SEEDS = range(40)
_BOUGHT = ("BUY", Decimal(10), Decimal(100), Decimal(0))
KNOWN = [_BOUGHT, ("TRANSFER_IN", Decimal(0), Decimal(7), Decimal(0)), _BOUGHT,
         ("SELL", Decimal(15), Decimal(180), Decimal(0))]  # fmt: skip
"""Once two costs came of it, 50 in one batch and 57 in two."""

# Everything that is stored for a key, but for what says which key, when and in which batch.
_ROWS = """
select security_id, to_jsonb(h) - array['security_id', 'portfolio_id', 'epoch', 'transaction_id', 'recorded_at']
from position_history h where portfolio_id = $1 and superseded_epoch is null order by security_id, sequence
"""
_STATED = """
select security_id, to_jsonb(l) - array['security_id', 'portfolio_id', 'epoch'] from lots_after_split l
where portfolio_id = $1 order by security_id, split_sequence, sequence
"""


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(database)
    yield connection
    await connection.close()


def history(seed: int) -> list[tuple[str, Decimal, Decimal, Decimal]]:
    """(type, quantity, amount, fee): many lots, some without units, some shorts, some splits."""
    chance = Random(seed)
    rows = []
    for _ in range(chance.randint(4, 12)):
        kind, amount, fee = chance.choice([*KINDS, "BUY", "SELL"]), chance.randint(0, 999), chance.randint(0, 9)
        quantity = Decimal(chance.choice(["10", "10", "15", "4", "0.0000000003"]))
        match chance.randrange(10):
            case 0:
                kind, quantity = "SPLIT", Decimal(chance.choice(["2", "0.3333333333", "0.1", "3"]))
            case 1 | 2 | 3:
                kind, quantity = chance.choice(["BUY", "TRANSFER_IN"]), Decimal(0)
        rows.append((kind, quantity, Decimal(amount), Decimal(fee)))
    return rows


def as_key(rows: Sequence[tuple[str, Decimal, Decimal, Decimal]], portfolio: str, security: str) -> list[Transaction]:
    return [
        Transaction(f"{portfolio}-{security}-{n:02}", portfolio, security, JAN[0] + timedelta(hours=n), kind,
                    quantity, Decimal(0), amount, fee)
        for n, (kind, quantity, amount, fee) in enumerate(rows)
    ]  # fmt: skip


async def stored(connection: asyncpg.Connection, portfolio: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for sql in (_ROWS, _STATED):
        for security, text in await connection.fetch(sql, portfolio):
            found[security].append(json.loads(text, parse_float=Decimal, parse_int=Decimal))
    return found


@pytest.mark.parametrize("method", ["FIFO", "AVCO"])
async def test_every_way_to_cut_a_history_makes_the_same_rows(
    connection: asyncpg.Connection, database: str, method: CostBasisMethod
) -> None:
    """A security for each history, a portfolio for each place where all of them are cut, and one for every place."""
    histories = {f"S{seed:02}": history(seed) for seed in SEEDS} | {"KNOWN": KNOWN}
    longest = max(map(len, histories.values()))
    cuts = {f"at {place:02}": [place] for place in range(longest)} | {"everywhere": list(range(longest))}
    batches: dict[int, list[Transaction]] = defaultdict(list)
    for portfolio, places in cuts.items():
        for security, rows in histories.items():
            for n, transaction in enumerate(as_key(rows, portfolio, security)):
                batches[sum(place <= n for place in places)].append(transaction)
    for _, batch in sorted(batches.items()):
        await book(connection, *batch, method=method)
    whole = await stored(connection, "at 00")
    assert sum(map(len, whole.values())) >= sum(map(len, histories.values()))
    for portfolio in cuts:
        found = await stored(connection, portfolio)
        assert found == whole, [security for security in whole if found[security] != whole[security]]
    assert (await audit_books(database, method)).differences == []


async def test_late_records_come_to_the_same_rows(connection: asyncpg.Connection, database: str) -> None:
    """Whatever a rebuild starts from: before a split, between two, behind them."""
    chance = Random(7)
    for seed in SEEDS:
        rows = as_key(history(seed), "late", f"S{seed:02}")
        await book(connection, *as_key(history(seed), "whole", f"S{seed:02}"))
        while rows:
            size = chance.randint(1, 4)
            await book(connection, *(rows.pop(chance.randrange(len(rows))) for _ in range(min(size, len(rows)))))
    assert await stored(connection, "late") == await stored(connection, "whole")
    assert (await audit_books(database, "FIFO")).differences == []
    assert await connection.fetchval(
        """
        select count(*) from lots_after_split l where not exists (
            select from position_history h where h.superseded_epoch is null and h.restates_lots
              and (h.security_id, h.portfolio_id, h.epoch, h.sequence)
                  = (l.security_id, l.portfolio_id, l.epoch, l.split_sequence))
        """
    ) == 0  # fmt: skip


async def test_disposals_read_the_lots_they_need_and_what_later_rows_have_added(connection: asyncpg.Connection) -> None:
    rows = [*[("BUY", 10, 100)] * 4, ("SPLIT", 2, 0), ("BUY", 10, 50), ("BUY", 0, 7), ("BUY", 10, 50), ("SELL", 30, 0)]
    key = as_key([(kind, Decimal(q), Decimal(amount), Decimal(0)) for kind, q, amount in rows], "P", "S")
    await book(connection, *key)

    async def lots(needed: int, after: int = 2, upto: int = 9) -> list[tuple[int, int, int]]:
        found = await connection.fetch("select * from open_lots('S', 'P', $1, $2, $3)", after, upto, needed)
        return [(int(row[0]), int(row[1]), int(row[2])) for row in found]

    stated, opened = [(3, 20, 100), (4, 20, 100)], [(7, 10, 57), (8, 10, 50)]
    assert await lots(5) == await lots(20) == stated[:1]
    assert await lots(45) == [*stated, opened[0]]
    assert await lots(999) == [*stated, *opened]
    assert await lots(999, upto=5) == stated
    assert await lots(999, after=0, upto=4) == [(n, 10, 100) for n in (1, 2, 3, 4)]
    assert await lots(999, after=5) == opened


async def test_what_is_out_of_range_is_kept_marked_and_listed(connection: asyncpg.Connection, database: str) -> None:
    """A chain of splits that would go on for ever: nothing stops, the books stay those of before."""
    chain = [("BUY", Decimal(3), Decimal(9), Decimal(0)), *[("SPLIT", Decimal(10**17), Decimal(0), Decimal(0))] * 300]
    key = as_key(chain, "P", "S")
    await book(connection, *key[:150])
    await book(connection, *key[150:])
    row = await connection.fetchrow(
        "select count(*), max(quantity), min(sequence), max(transaction_quantity) from out_of_range_transactions"
    )
    assert tuple(row) == (299, 3 * 10**17, 3, 10**17)
    assert await connection.fetchval("select count(*) from position_history") == 301
    assert (await audit_books(database, "FIFO")).differences == []
    await connection.execute("update position_history set out_of_range = null where sequence = 7")
    (difference,) = (await audit_books(database, "FIFO")).differences
    assert str(difference) == "portfolio P, security S, history 7: out_of_range is False, should be True"
    first = key[0]
    cancelled = Transaction(*(getattr(first, name) for name in first.__struct_fields__[:-2]), 1, True)
    await book(connection, cancelled)
    assert await connection.fetchval("select count(*) from out_of_range_transactions") == 0


async def test_books_of_other_lots_are_refused(connection: asyncpg.Connection) -> None:
    rows = [("BUY", Decimal(10), Decimal(100), Decimal(0))] * 2
    await book(connection, *as_key(rows, "P", "S"), method="AVCO")
    late = as_key([*rows, ("SPLIT", Decimal(2), Decimal(0), Decimal(0))], "P", "S")[2:]
    with pytest.raises(positions.costing.LotsMissing):
        await book(connection, *late)
