"""One piece of the books recomputed and compared: what the audit does many times, in one process or in several."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from typing import Any

from sinks.audit_reader import BooksReader, Piece, PieceRows, open_books
from tidemark.oracle import (
    Actual,
    Difference,
    HistoryRow,
    Key,
    Method,
    Price,
    SnapshotRow,
    StateRow,
    Transaction,
    compare,
    compute_books,
)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a piece had: rows compared, keys that wait for a correction or a valuation, and what differs."""

    latest: date | None
    keys: int
    history_rows: int
    snapshots: int
    waiting: list[Key] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


def audit_in_process(dsn: str, method: Method, piece: Piece, snapshot: str) -> Findings:
    """The same for a worker process, which has no event loop of its own."""

    async def audit() -> Findings:
        async with open_books(dsn, snapshot) as reader:
            return await audit_piece(reader, method, piece)

    return asyncio.run(audit())


async def audit_piece(reader: BooksReader, method: Method, piece: Piece) -> Findings:
    """Recompute the piece's keys from their transactions and prices, and compare them with the tables."""
    return _compare(await reader.read(piece), method)


def _compare(rows: PieceRows, method: Method) -> Findings:
    calendar, dirty = rows.business_dates, rows.dirty
    latest = calendar[-1] if calendar else None
    transactions = [Transaction(*row) for row in rows.transactions]
    books = compute_books(transactions, (Price(*row) for row in rows.prices), calendar, method)
    actual = _actual(rows)
    compared = sum(
        len(of_key) if key not in dirty else sum(row.valuation_date < dirty[key] for row in of_key)
        for key, of_key in books.snapshots.items()
    )
    return Findings(
        latest=latest,
        keys=len({*books.history, *actual.states}),
        history_rows=sum(map(len, books.history.values())),
        snapshots=compared,
        waiting=sorted(dirty),
        differences=compare(books, actual, latest=latest, dirty=dirty),
    )


def _actual(rows: PieceRows) -> Actual:
    """Rows come in order of their keys: (portfolio_id, security_id, epoch), then what the oracle compares."""
    history: dict[Key, list[HistoryRow]] = {}
    snapshots: dict[Key, list[SnapshotRow]] = {}
    epochs: dict[Key, int] = {}
    for key, of_key in groupby(rows.history, _key):
        found = list(of_key)
        history[key] = [HistoryRow._make(row[3:]) for row in found]
        epochs[key] = max(row[2] for row in found)
    for key, of_key in groupby(rows.snapshots, _key):
        found = list(of_key)
        snapshots[key] = [SnapshotRow._make(row[3:]) for row in found]
        epochs[key] = max(epochs.get(key, 0), max(row[2] for row in found))
    states = {_key(row): StateRow._make(row[2:]) for row in rows.states}
    return Actual(history, snapshots, states, epochs)


def _key(row: Any) -> Key:
    return (row[0], row[1])
