"""The whole books, or a part of them, at one moment: piece by piece, in several processes."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import date

from sinks.audit_reader import BooksReader, Piece, of_security, open_books
from tidemark.audit.piece import Findings, audit_in_process, audit_piece
from tidemark.oracle import Difference, Key, Method

ROWS_AT_ONCE = 25_000
"""Snapshots in a piece, about: what bounds the audit's memory, together with the number of processes."""
_KEYS_AT_ONCE = 2_000
_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Scope:
    """What to audit: everything, or what the one field that is set says.

    sample: so many keys at random, or with sample_percent that share of all keys.
    """

    portfolio_id: str | None = None
    security_id: str | None = None
    key: Key | None = None
    sample: int | None = None
    sample_percent: float | None = None


@dataclass
class AuditResult:
    """What was compared and what differed. waiting: keys whose snapshots are not all expected to be right yet.

    Of waiting and differences the first ten thousand are kept; all are counted.
    """

    method: Method
    latest: date | None = None
    keys: int = 0
    history_rows: int = 0
    snapshots: int = 0
    waiting_count: int = 0
    difference_count: int = 0
    waiting: list[Key] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all that was compared is as it must be; what waits does not count against it."""
        return not self.difference_count

    def add(self, findings: Findings) -> None:
        """Count a piece in."""
        self.latest = findings.latest
        self.keys += findings.keys
        self.history_rows += findings.history_rows
        self.snapshots += findings.snapshots
        self.waiting_count += len(findings.waiting)
        self.difference_count += len(findings.differences)
        self.waiting += findings.waiting[: max(0, _KEPT - len(self.waiting))]
        self.differences += findings.differences[: max(0, _KEPT - len(self.differences))]


async def audit_books(
    dsn: str,
    method: Method,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    scope: Scope | None = None,
    processes: int = 1,
    on_difference: Callable[[Difference], None] = lambda difference: None,
) -> AuditResult:
    """Recompute the books and list every difference (contract, Commands).

    Reads one moment of the database, so it may run while records flow; memory does not grow with the books.
    on_progress gets the keys done and how many there are. Raises DatabaseError.
    """
    result = AuditResult(method)
    async with open_books(dsn) as reader:
        whole, total = await _resolve(reader, scope or Scope())
        on_progress(0, total)
        async with _workers(dsn, reader, method, processes) as audit:
            running: set[asyncio.Future[Findings]] = set()
            async for piece in split(reader, whole):
                running.add(asyncio.ensure_future(audit(piece)))
                if len(running) >= processes + (processes > 1):
                    running = await _collect(result, running, on_difference)
                    on_progress(min(result.keys, total), total)
            while running:
                running = await _collect(result, running, on_difference)
                on_progress(min(result.keys, total), total)
    result.differences.sort(key=lambda difference: difference.key)
    result.waiting.sort()
    on_progress(total, total)
    return result


async def _resolve(reader: BooksReader, scope: Scope) -> tuple[Piece, int]:
    """The scope as one large piece, and how many keys it has."""
    if scope.key:
        keys = [(scope.key[1], scope.key[0])]
    elif scope.portfolio_id is not None:
        keys = await reader.keys_of_portfolio(scope.portfolio_id)
    elif scope.sample is not None:
        keys = await reader.sample(scope.sample)
    elif scope.sample_percent is not None:
        keys = await reader.sample(round(await reader.count_keys(Piece()) * scope.sample_percent / 100))
    else:
        whole = Piece() if scope.security_id is None else of_security(scope.security_id)
        return whole, await reader.count_keys(whole)
    return Piece(keys=tuple(sorted(keys))), len(keys)


async def piece_size(reader: BooksReader) -> int:
    """How many keys make a piece."""
    dates = len(await reader.business_dates())
    return max(1, min(_KEYS_AT_ONCE, ROWS_AT_ONCE // (dates + 1)))


async def split(reader: BooksReader, whole: Piece) -> AsyncIterator[Piece]:
    """Pieces of about ROWS_AT_ONCE snapshots each; at least of one key."""
    size = await piece_size(reader)
    if whole.keys is not None:
        for first in range(0, len(whole.keys), size):
            yield Piece(keys=whole.keys[first : first + size])
        return
    rest = whole
    while True:
        piece = await reader.head(rest, size)
        yield piece
        if piece.upto == whole.upto:
            return
        rest = replace(rest, after=piece.upto)


@asynccontextmanager
async def _workers(
    dsn: str, reader: BooksReader, method: Method, processes: int
) -> AsyncIterator[Callable[[Piece], asyncio.Future[Findings]]]:
    """What audits a piece at the reader's moment: the reader itself, or processes that share its snapshot."""
    if processes == 1:
        # One piece at a time: it is the reader's own connection.
        yield lambda piece: asyncio.ensure_future(audit_piece(reader, method, piece))
        return
    snapshot = await reader.snapshot()
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield lambda piece: loop.run_in_executor(pool, audit_in_process, dsn, method, piece, snapshot)


async def _collect(
    result: AuditResult, running: set[asyncio.Future[Findings]], on_difference: Callable[[Difference], None]
) -> set[asyncio.Future[Findings]]:
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        findings = future.result()
        result.add(findings)
        for difference in findings.differences:
            on_difference(difference)
    return rest
