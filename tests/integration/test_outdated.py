"""Books that an earlier version wrote by other rules: a rebuild after the upgrade, and both versions side by side."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sinks import outdated, repairs
from sinks.database import Pool, connect, connect_pool, migrate
from streams.records import decode_transaction
from tests.gate import open_gate
from tests.integration.test_batching_sql import stored
from tests.integration.test_positions_sql import book
from tidemark.audit import audit_books

ROOT = Path(__file__).parents[2]
_EARLIER = "6c21815"
"""Before splits stated lots anew, and quantities had ten places."""

_PROGRAM = """
import asyncio, json, sys
from sinks import positions
from sinks.database import connect, migrate
from streams.records import decode_transaction

async def main(dsn, batches):
    if "--migrate" in sys.argv:
        await migrate(dsn)
    connection = await connect(dsn)
    for batch in batches:
        async with connection.transaction():
            decoded = [decode_transaction(json.dumps(record).encode()) for record in batch]
            await positions.apply(connection, list(enumerate(decoded)), "FIFO")
    await connection.close()

asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
"""

Batches = list[list[dict[str, Any]]]
BUY, SELL, MORE = ("BUY", 10, 100), ("SELL", 15, 180), ("TRANSFER_IN", 0, 7)
THIRD = ("SPLIT", "0.3333333333", 0)
HISTORIES = {
    "plain": [BUY, BUY, SELL, BUY, SELL],
    "dust": [("BUY", "1.1", 100), THIRD, ("SELL", "0.3666666666", 300), ("DIVIDEND", 0, 1), BUY],
    "gone": [("BUY", "0.0000000001", 100), THIRD, BUY, BUY, SELL],
    "split": [BUY, BUY, BUY, ("SPLIT", 2, 0), SELL, BUY, SELL],
    "joined": [BUY, BUY, MORE, BUY, SELL, SELL],
    "alone": [BUY, MORE, BUY, ("SELL", 5, 60), ("SELL", 10, 120)],
    "chain": [BUY, *[("SPLIT", "999999999999999999", 0)] * 3, ("SELL", 1, 5), ("BUY", 1, 5)],
}


def records(portfolio: str, part: slice) -> list[dict[str, Any]]:
    """Records number so and so of each history."""
    return [
        {
            "transaction_id": f"{portfolio}-{security}-{n}", "portfolio_id": portfolio, "security_id": security,
            "transaction_date": f"2025-01-02T10:{n:02}:00Z", "transaction_type": kind, "quantity": quantity,
            "price": 1, "gross_transaction_amount": amount,
        }
        for security, rows in HISTORIES.items()
        for n, (kind, quantity, amount) in list(enumerate(rows))[part]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def earlier(folder: Path) -> Path:
    """The code of that revision. Skips, saying so, where the history is not there."""
    known = subprocess.run(["git", "cat-file", "-e", f"{_EARLIER}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"NOT RUN: the history does not reach back to {_EARLIER}: clone it whole to test upgrades")
    place = folder / "before-quantities"
    place.mkdir()
    archive = subprocess.run(["git", "archive", _EARLIER, "sinks", "streams", "tables"], cwd=ROOT, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=place, input=archive.stdout, check=True)
    return place


async def book_by_earlier(earlier: Path, dsn: str, batches: Batches, *options: str) -> None:
    """As workers of that version do, on the schema that is there, or on their own with --migrate."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, dsn, *options, cwd=earlier, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(earlier)},
    )  # fmt: skip
    _, errors = await process.communicate(json.dumps(batches).encode())
    assert process.returncode == 0, errors.decode()


async def book_by_this(connection: asyncpg.Connection, batches: Iterable[list[dict[str, Any]]]) -> None:
    for batch in batches:
        await book(connection, *(decode_transaction(json.dumps(record).encode()) for record in batch))


def one_by_one(portfolio: str, part: slice = slice(None)) -> Batches:
    places = range(max(map(len, HISTORIES.values())))[part]
    return [records(portfolio, slice(n, n + 1)) for n in places]


@pytest.fixture
async def pool(empty_database: str) -> AsyncIterator[Pool]:
    async with await connect_pool(empty_database) as opened:
        yield opened


async def rebuild_all(pool: Pool) -> int:
    rebuilder, keys = outdated.Rebuilder(pool, "FIFO"), 0
    while (done := await rebuilder.step()).keys:
        assert done.failed == {}
        keys += done.keys
    return keys


async def test_books_of_the_version_before_are_booked_anew(earlier: Path, empty_database: str, pool: Pool) -> None:
    await book_by_earlier(earlier, empty_database, one_by_one("old"), "--migrate")
    assert "0015_quantities" in await migrate(empty_database)
    await open_gate(empty_database)
    async with pool.acquire() as connection:
        old = await stored(connection, "old")
        await book_by_this(connection, one_by_one("new"))
        new = await stored(connection, "new")
        assert {security for security in HISTORIES if old[security] != new[security]} == {*HISTORIES} - {"plain"}
        listed = await connection.fetch("select distinct security_id, portfolio_id from outdated_histories")
        assert {tuple(row) for row in listed} == {(security, "old") for security in HISTORIES if security != "plain"}
        assert await rebuild_all(pool) == len(HISTORIES) - 1
        assert await stored(connection, "old") == new
        assert await connection.fetchval("select count(*) from outdated_histories") == 0
        assert await rebuild_all(pool) == 0
        named = await connection.fetchval("select arguments from operator_actions where actor = 'upgrade'")
        assert len(json.loads(named)["keys"]) == len(HISTORIES) - 1
    assert (await audit_books(empty_database, "FIFO")).differences == []


async def test_a_change_of_an_outdated_history_books_all_of_it_anew(
    earlier: Path, empty_database: str, pool: Pool
) -> None:
    """The sink does not wait for the `books` role; dates before the change are valued again as well."""
    await book_by_earlier(earlier, empty_database, one_by_one("old", slice(4)), "--migrate")
    await migrate(empty_database)
    await open_gate(empty_database)
    async with pool.acquire() as connection:
        await connection.execute("update position_state set watermark_date = '2025-02-01'")
        late = [{**record, "transaction_date": "2025-03-03T10:00:00Z"} for record in records("old", slice(4, None))]
        await book_by_this(connection, [late])
        assert await connection.fetchval("select count(*) from outdated_histories") == 0
        watermarks = await connection.fetch("select security_id, watermark_date::text from position_state")
        assert {row[1] for row in watermarks if row[0] != "plain"} == {"2025-01-01"}
        assert {row[1] for row in watermarks if row[0] == "plain"} == {"2025-02-01"}
    found = (await audit_books(empty_database, "FIFO")).differences
    assert [str(each) for each in found if each.table == "position_history"] == []


async def test_both_versions_side_by_side(earlier: Path, empty_database: str, pool: Pool) -> None:
    """Batches of each in turn, on one schema: none stops, and what is left is right after the last rebuild."""
    await book_by_earlier(earlier, empty_database, one_by_one("mixed", slice(2)), "--migrate")
    await migrate(empty_database)
    await open_gate(empty_database)
    async with pool.acquire() as connection:
        for place in range(2, max(map(len, HISTORIES.values()))):
            batches = one_by_one("mixed", slice(place, place + 1))
            if place % 2:
                await book_by_earlier(earlier, empty_database, batches)
            else:
                await book_by_this(connection, batches)
            if place == 3:
                await rebuild_all(pool)
        await book_by_earlier(earlier, empty_database, [[{
            "transaction_id": "late", "portfolio_id": "mixed", "security_id": "split", "price": 1, "quantity": 1,
            "transaction_date": "2025-01-01T10:00:00Z", "transaction_type": "BUY"}]])  # fmt: skip
        await rebuild_all(pool)
        assert await connection.fetchval("select count(*) from outdated_histories") == 0
    found = (await audit_books(empty_database, "FIFO")).differences
    assert [str(each) for each in found if each.table == "position_history"] == []


async def test_a_key_that_cannot_be_booked_does_not_stop_the_others(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await connect(database)
    await book_by_this(connection, one_by_one("P", slice(3)))
    await connection.execute("update position_history set split_ratio = 2 where sequence = 2")
    rebuild = repairs.rebuild

    async def breaks(connection: Any, actor: str, keys: Any, method: Any) -> int:
        if ("split", "P") in keys:
            raise ArithmeticError("no")
        return await rebuild(connection, actor, keys, method)

    monkeypatch.setattr(repairs, "rebuild", breaks)
    async with await connect_pool(database) as pool:
        rebuilder = outdated.Rebuilder(pool, "FIFO")
        for keys in (len(HISTORIES) - 1, 0, 0):
            done = await rebuilder.step()
            assert done.keys == keys
    assert done.failed == {("split", "P"): "ArithmeticError: no"}
    left = await connection.fetch("select security_id from outdated_histories")
    assert [row[0] for row in left] == ["split"]
    assert Decimal(2) == await connection.fetchval("select split_ratio from position_history where split_ratio = 2"
                                                   " and superseded_epoch is null")  # fmt: skip
    await connection.close()
