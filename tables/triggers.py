"""The trigger table's state machine: per security one job in flight, one trigger pending. Pure (design, section 3).

A newer job for a security is published only when the older one has ended, so compaction of the job topic cannot lose
work. Everything is idempotent by seq: events may come twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated

import msgspec

REPAIR = "repair"
_TERMINAL = frozenset({"COMPLETE", "FAILED", "CANCELLED"})

_Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
_Word = Annotated[str, msgspec.Meta(max_length=40)]
_EARLIEST, _LATEST = date(1900, 1, 1), date(9999, 12, 30)  # the day after it is infinity, to asyncpg


class Trigger(msgspec.Struct, frozen=True):
    """The earliest date that late input touches; covers corrections of the security up to seq."""

    security_id: _Name
    earliest_impacted_date: date
    seq: _Seq
    reason: _Word

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _check_date(self.earliest_impacted_date)


class Job(msgspec.Struct, frozen=True):
    """One RESET_WATERMARKS job (contract, Output topics)."""

    job_id: _Seq
    security_id: _Name
    earliest_impacted_date: date
    seq: _Seq
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    job_type: _Word = "RESET_WATERMARKS"

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _check_date(self.earliest_impacted_date)


class Status(msgspec.Struct, frozen=True):
    """What became of a job; further fields do not matter here."""

    job_id: _Seq
    security_id: _Name
    status: _Word


class Entry(msgspec.Struct, frozen=True):
    """A row of the table."""

    in_flight: Job | None = None
    pending: Trigger | None = None

    @property
    def highest(self) -> int:
        """The highest number that it names."""
        return max(
            self.in_flight.job_id if self.in_flight else 0,
            self.in_flight.seq if self.in_flight else 0,
            self.pending.seq if self.pending else 0,
        )


def _check_date(day: date) -> None:
    if not _EARLIEST <= day <= _LATEST:
        raise ValueError(f"{day} is not between {_EARLIEST} and {_LATEST}")


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
