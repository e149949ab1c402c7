"""What a failed transaction says about the records in it: to be waited out, too much at once, or lost with them. Pure.

The database's own troubles (locks, deadlocks, a full disk, a restart, a lost network) say nothing about a record. A
limit that a statement exceeds says that it had too much to do. A connection that is lost again and again inside the
effect, while connecting works, is lost because of the effect.
"""

from __future__ import annotations

from enum import Enum

import asyncpg

from sinks.database import is_transient

_LIMITS = frozenset(
    {
        "57014",  # canceled: statement_timeout
        "25P04",  # transaction_timeout
        "53200",  # out of memory
        "53400",  # a configured limit: temp_file_limit
        "54000",  # a limit of the program
        "54001",  # statement too complex
        "54023",  # too many arguments
    }
)
_REPEATED = 3  # the same batch, in a row


class Failure(Enum):
    """BUG: no retry helps. WAIT: it may pass. LIMIT: a statement had too much to do. LOST: its session died."""

    BUG = "bug"
    WAIT = "wait"
    LIMIT = "limit"
    LOST = "lost"


def failure_of(error: BaseException, in_effect: bool) -> Failure:
    """in_effect: the effect's own statement raised it, not the connecting, the fence or the commit around it."""
    if in_effect and (getattr(error, "sqlstate", None) in _LIMITS or isinstance(error, TimeoutError)):
        return Failure.LIMIT
    if not is_transient(error):
        return Failure.BUG
    if in_effect and not _said_by_server(error):
        return Failure.LOST
    return Failure.WAIT


def _said_by_server(error: BaseException) -> bool:
    """Whether the server gave a reason; a session whose backend died ends without a word."""
    return isinstance(error, asyncpg.PostgresError) and not isinstance(error, asyncpg.PostgresConnectionError)


def is_too_much(failure: Failure, in_a_row: int, records: int, patience: int) -> bool:
    """Whether to try fewer records instead of all again, or, with one record, to give it up after so many failures.

    records: 0 for an effect that has nothing to divide; it is retried for ever.
    """
    if records == 0 or failure is Failure.BUG:
        return False
    if records == 1:
        return failure is not Failure.WAIT and in_a_row >= patience
    return failure is Failure.LIMIT or in_a_row >= _REPEATED
