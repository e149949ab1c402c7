"""How far each correction is: the read model behind the console, the API and the commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Literal

from sinks import holders
from sinks.database import Connection

Phase = Literal["WAITING", "RESETTING", "VALUING", "RIGHT", "HELD"]

PHASE = """
case when c.right_at is not null then 'RIGHT' when c.held then 'HELD' when c.reset_at is not null then 'VALUING'
     when j.status = 'PROCESSING' then 'RESETTING' else 'WAITING' end
"""
"""SQL: the phase of the correction `c`; `j` is its job, if it has one."""

# Left: the keys that this correction has reset and no valuation has reached yet, and their dates; of a correction that
# is right, the keys are not looked at.
_PROGRESS = f"""
with latest as (select max(business_date) as business_date from business_dates)
select c.seq, c.security_id, c.earliest_date, c.reason, {PHASE} as phase, c.issued_at, c.job_id,
       j.status as job_status, j.priority, j.failure_reason, j.keys_total, j.keys_done,
       still.keys_to_value, still.dates_left, j.started_at, j.finished_at, c.reset_at, c.right_at,
       coalesce(c.snapshots_changed, so_far.snapshots) as snapshots_changed,
       coalesce(c.absolute_change, so_far.absolute_change) as absolute_change,
       coalesce(c.changed_from, so_far.from_date) as changed_from, coalesce(c.changed_to, so_far.to_date) as changed_to,
       extract(epoch from c.right_at - c.issued_at)::float8 as seconds_to_right,
       extract(epoch from coalesce(j.finished_at, clock_timestamp()) - j.started_at)::float8 as resetting_seconds,
       extract(epoch from clock_timestamp() - c.reset_at)::float8 as valuing_seconds
from corrections c left join reprocessing_jobs j using (job_id)
cross join lateral (
    select count(*) as keys_to_value,
           coalesce(sum((select count(*) from business_dates d
                         where d.business_date > s.watermark_date and d.business_date <= latest.business_date)), 0)
               ::bigint as dates_left
    from position_state s, latest
    where c.right_at is null and s.security_id = c.security_id and s.reset_seq <= c.seq
      and {holders.due("s", "latest.business_date")}
) as still
cross join lateral (
    select coalesce(sum(snapshots), 0)::bigint as snapshots, coalesce(sum(absolute_change), 0) as absolute_change,
           min(from_date) as from_date, max(to_date) as to_date
    from correction_changes d where c.right_at is null and d.seq = c.seq
) as so_far
where c.seq = any($1::bigint[])
order by array_position($1::bigint[], c.seq)
"""

_OF_SECURITY = "select seq from corrections where security_id = $1 order by right_at is null desc, seq desc limit $2"


@dataclass(frozen=True, slots=True)
class CorrectionProgress:
    """One correction, from arrival until the books are right.

    keys_total, keys_done: of the reset (None without a job). keys_to_value, dates_left: reset, and not valued yet.
    keys_per_second: of the phase it is in; eta_seconds: of that phase; None where nothing is known yet.
    snapshots_changed, absolute_change (of market values), changed_from, changed_to: of what the books had said, so far.
    """

    seq: int
    security_id: str
    earliest_date: date
    reason: str
    phase: Phase
    issued_at: datetime
    job_id: int | None
    job_status: str | None
    priority: int | None
    failure_reason: str | None
    keys_total: int | None
    keys_done: int | None
    keys_to_value: int
    dates_left: int
    keys_per_second: float | None
    eta_seconds: float | None
    started_at: datetime | None
    finished_at: datetime | None
    reset_at: datetime | None
    right_at: datetime | None
    snapshots_changed: int
    absolute_change: Decimal
    changed_from: date | None
    changed_to: date | None
    seconds_to_right: float | None

    @property
    def keys_to_reset(self) -> int:
        """Holders that the reset has still to reach, as counted when the job was opened."""
        return 0 if self.reset_at else max(0, (self.keys_total or 0) - (self.keys_done or 0))


async def correction_progress(connection: Connection, seq: int) -> CorrectionProgress | None:
    """One correction by its sequence number, or None."""
    return next(iter(await corrections_progress(connection, [seq])), None)


async def corrections_progress(connection: Connection, seqs: Sequence[int]) -> list[CorrectionProgress]:
    """Corrections by their sequence numbers, in that order; those that do not exist are left out."""
    return [_progress(dict(row)) for row in await connection.fetch(_PROGRESS, list(seqs))]


async def security_progress(connection: Connection, security_id: str, limit: int = 20) -> list[CorrectionProgress]:
    """The security's latest corrections, open ones first."""
    found = await connection.fetch(_OF_SECURITY, security_id, limit)
    return await corrections_progress(connection, [row["seq"] for row in found])


def _progress(row: dict[str, Any]) -> CorrectionProgress:
    resetting, valuing = row.pop("resetting_seconds"), row.pop("valuing_seconds")
    total, done, left = row["keys_total"], row["keys_done"], row["keys_to_value"]
    rate, eta = None, None
    if row["phase"] == "RESETTING":
        rate = _rate(done, resetting)
        eta = _eta((total or 0) - (done or 0), rate)
    elif row["phase"] == "VALUING" and total is not None:
        rate = _rate(total - left, valuing)
        eta = _eta(left, rate)
    return CorrectionProgress(**row, keys_per_second=rate, eta_seconds=eta)


def _rate(keys: int | None, seconds: float | None) -> float | None:
    return keys / seconds if keys and seconds else None


def _eta(keys: int, rate: float | None) -> float | None:
    return 0.0 if keys <= 0 else keys / rate if rate else None
