"""The trigger table's state machine: per security one job in flight, one trigger pending. Pure (design, section 3).

A newer job for a security is published only when the older one has ended, so compaction of the job topic cannot lose
work. Everything is idempotent by seq: events may come twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime

import msgspec

REPAIR = "repair"
_TERMINAL = frozenset({"COMPLETE", "FAILED", "CANCELLED"})


class Trigger(msgspec.Struct, frozen=True):
    """The earliest date that late input touches; covers corrections of the security up to seq."""

    security_id: str
    earliest_impacted_date: date
    seq: int
    reason: str


class Job(msgspec.Struct, frozen=True):
    """One RESET_WATERMARKS job (contract, Output topics)."""

    job_id: int
    security_id: str
    earliest_impacted_date: date
    seq: int
    created_at: datetime
    job_type: str = "RESET_WATERMARKS"


class Status(msgspec.Struct, frozen=True):
    """What became of a job; further fields do not matter here."""

    job_id: int
    security_id: str
    status: str


class Entry(msgspec.Struct, frozen=True):
    """A row of the table."""

    in_flight: Job | None = None
    pending: Trigger | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The row from now on (None: delete it), and what to publish *before* the row is written.

    publish: a job, or with `release` a tombstone for the security.
    """

    entry: Entry | None
    publish: Job | None = None
    release: bool = False


def on_trigger(entry: Entry | None, trigger: Trigger, now: datetime) -> Decision:
    """Merge the trigger, and promote when nothing is in flight.

    A repair whose work is covered by the job in flight publishes that job again: the watermark sink answers a
    finished one with its status, which releases it.
    """
    entry = entry or Entry()
    running = entry.in_flight
    if running and trigger.seq <= running.seq and trigger.earliest_impacted_date >= running.earliest_impacted_date:
        return Decision(entry, running if trigger.reason == REPAIR else None)
    waiting = _merge(entry.pending, trigger)
    if running is None:
        return _promote(waiting, now)
    return Decision(Entry(running, waiting), running if trigger.reason == REPAIR else None)


def on_status(entry: Entry | None, status: Status, now: datetime) -> Decision:
    """A job that ended makes room for what waits; with nothing waiting the row goes and the job is tombstoned."""
    if entry is None or entry.in_flight is None:
        return Decision(entry)
    if status.status not in _TERMINAL or status.job_id < entry.in_flight.job_id:
        return Decision(entry)
    if entry.pending:
        return _promote(entry.pending, now)
    return Decision(None, release=True)


def _merge(pending: Trigger | None, trigger: Trigger) -> Trigger:
    if pending is None:
        return trigger
    return Trigger(
        trigger.security_id,
        min(pending.earliest_impacted_date, trigger.earliest_impacted_date),
        max(pending.seq, trigger.seq),
        trigger.reason if trigger.seq >= pending.seq else pending.reason,
    )


def _promote(trigger: Trigger, now: datetime) -> Decision:
    job = Job(trigger.seq, trigger.security_id, trigger.earliest_impacted_date, trigger.seq, now)
    return Decision(Entry(in_flight=job), publish=job)
