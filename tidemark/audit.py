"""The audit: the books of a database against a recomputation by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date

from sinks.audit_reader import SecurityRows, open_books
from tidemark.oracle import Actual, Books, Key, Method, Price, Transaction, compare, compute_books


@dataclass
class AuditResult:
    """What was compared and what differed. waiting: keys whose snapshots are not expected to be right yet."""

    method: Method
    latest: date | None = None
    keys: int = 0
    history_rows: int = 0
    snapshots: int = 0
    waiting: list[Key] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all that was compared is as it must be; waiting keys do not count against it."""
        return not self.differences


async def audit_books(
    dsn: str,
    method: Method,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    choose: Callable[[list[str]], list[str]] = lambda securities: securities,
) -> AuditResult:
    """Recompute the books security by security and list every difference (contract, Commands).

    Reads one moment of the database, so it may run while records flow. on_progress gets the securities done
    and how many there are; choose picks those to audit.
    """
    result = AuditResult(method)
    async with open_books(dsn) as reader:
        calendar = await reader.business_dates()
        result.latest = calendar[-1] if calendar else None
        waiting = await reader.dirty_keys()
        result.waiting = sorted(waiting)
        securities = choose(await reader.securities())
        for done, security in enumerate(securities):
            on_progress(done, len(securities))
            _audit_security(result, await reader.security(security), calendar, waiting)
        on_progress(len(securities), len(securities))
    return result


def _audit_security(result: AuditResult, rows: SecurityRows, calendar: list[date], waiting: set[Key]) -> None:
    books = compute_books(
        map(Transaction.from_row, rows.transactions),
        map(Price.from_row, rows.prices),
        calendar,
        result.method,
    )
    actual = Actual(rows.history, rows.snapshots, rows.states)
    result.differences += compare(books, actual, latest=result.latest, waiting=waiting)
    result.keys += len(books.history)
    result.history_rows += sum(map(len, books.history.values()))
    result.snapshots += _compared(books, waiting)


def _compared(books: Books, waiting: set[Key]) -> int:
    return sum(len(rows) for key, rows in books.snapshots.items() if key not in waiting)
