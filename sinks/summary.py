"""The state of the books in a few figures, counted now: for whoever asks from a shell. It writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import asyncpg

from sinks import audit_progress, monitor, operations, outbox
from sinks.database import Connection, DatabaseError


@dataclass(frozen=True, slots=True)
class Summary:
    """What is provisional up to the latest closed date, and what it waits for.

    reset_rate: keys per second in force, 0 while paused; None before any worker has set it.
    audit_age_seconds: since the auditor last went through all keys; None: not yet. audit_keys, audit_differences: of
    the pass under way.
    """

    latest_closed_date: date | None
    dirty_keys: int
    dirty_snapshots: int
    corrections_open: int
    corrections_held: int
    securities_waiting: int
    oldest_correction_seconds: float
    reset_rate: float | None
    resets_paused: bool
    outbox_pending: int
    outbox_held: int
    audit_age_seconds: float | None
    audit_keys: int
    audit_differences: int

    @property
    def right(self) -> bool:
        """Whether every date up to the latest closed one is final."""
        return not (self.dirty_keys or self.corrections_open)


async def read(connection: Connection) -> Summary:
    """All of it, at one moment. Cost: the keys of securities with work due. Raises DatabaseError where are no books."""
    try:
        return await _read(connection)
    except asyncpg.UndefinedTableError as error:
        raise DatabaseError("the database has no books yet: run `tidemark migrate`") from error


async def _read(connection: Connection) -> Summary:
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        ledger = await monitor.read_ledger(connection)
        keys = await monitor.count_keys(connection)
        limit = await operations.limit_state(connection)
        waiting = await outbox.backlog(connection)
        audit = await audit_progress.under_way(connection)
        return Summary(
            latest_closed_date=ledger["business_date"],
            dirty_keys=keys["dirty_keys"],
            dirty_snapshots=keys["dirty_snapshots"],
            corrections_open=ledger["corrections_open"],
            corrections_held=ledger["corrections_held"],
            securities_waiting=ledger["triggers_pending"],
            oldest_correction_seconds=ledger["oldest_correction_seconds"],
            reset_rate=limit.in_force if limit else None,
            resets_paused=bool(limit and limit.paused),
            outbox_pending=waiting.pending,
            outbox_held=waiting.held,
            audit_age_seconds=await audit_progress.full_pass_age(connection),
            audit_keys=audit[0],
            audit_differences=audit[1],
        )
