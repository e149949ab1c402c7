"""How far each correction is: the read model behind the console, the API and the commands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

from sinks import holders
from sinks.database import Connection

Phase = Literal["WAITING", "RESETTING", "VALUING", "RIGHT", "HELD"]

_ONE = """
select c.seq, c.security_id, c.earliest_date, c.reason, c.issued_at, c.job_id, c.held, c.reset_at, c.right_at,
       j.status as job_status, j.priority, j.keys_total, j.keys_done, j.started_at, j.finished_at, j.failure_reason,
       extract(epoch from coalesce(j.finished_at, clock_timestamp()) - j.started_at)::float8 as resetting_seconds,
       extract(epoch from clock_timestamp() - c.reset_at)::float8 as valuing_seconds,
       extract(epoch from c.right_at - c.issued_at)::float8 as seconds_to_right
from corrections c left join reprocessing_jobs j using (job_id)
where c.seq = $1
"""

_OF_SECURITY = "select seq from corrections where security_id = $1 order by right_at is null desc, seq desc limit $2"

# Dates left: of the keys that this correction has reset and no valuation has reached yet, and of those still to reset.
_LEFT = f"""
with latest as (select max(business_date) as business_date from business_dates)
select count(*) as keys,
       coalesce(sum((select count(*) from business_dates d, latest
                     where d.business_date > s.watermark_date and d.business_date <= latest.business_date)), 0)::bigint
           as dates
from position_state s, latest
where s.security_id = $1 and s.reset_seq <= $2 and {holders.due("s", "latest.business_date")}
"""


@dataclass(frozen=True, slots=True)
class CorrectionProgress:
    """One correction, from arrival until the books are right.

    keys_total, keys_done: of the reset (None without a job). keys_to_value, dates_left: reset, and not valued yet.
    keys_per_second: of the phase it is in; eta_seconds: of that phase; None where nothing is known yet.
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
    seconds_to_right: float | None


async def correction_progress(connection: Connection, seq: int) -> CorrectionProgress | None:
    """One correction by its sequence number, or None."""
    row = await connection.fetchrow(_ONE, seq)
    if row is None:
        return None
    keys_left, dates_left = 0, 0
    if row["right_at"] is None:
        left = await connection.fetchrow(_LEFT, row["security_id"], seq)
        assert left is not None
        keys_left, dates_left = left["keys"], left["dates"]
    phase = _phase(row["right_at"], row["reset_at"], row["started_at"], held=row["held"])
    rate, eta = None, None
    total, done = row["keys_total"], row["keys_done"]
    if phase == "RESETTING":
        rate = _rate(done, row["resetting_seconds"])
        eta = _eta((total or 0) - (done or 0), rate)
    elif phase == "VALUING" and total is not None:
        rate = _rate(total - keys_left, row["valuing_seconds"])
        eta = _eta(keys_left, rate)
    return CorrectionProgress(
        seq=row["seq"],
        security_id=row["security_id"],
        earliest_date=row["earliest_date"],
        reason=row["reason"],
        phase=phase,
        issued_at=row["issued_at"],
        job_id=row["job_id"],
        job_status=row["job_status"],
        priority=row["priority"],
        failure_reason=row["failure_reason"],
        keys_total=total,
        keys_done=done,
        keys_to_value=keys_left,
        dates_left=dates_left,
        keys_per_second=rate,
        eta_seconds=eta,
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        reset_at=row["reset_at"],
        right_at=row["right_at"],
        seconds_to_right=row["seconds_to_right"],
    )


async def security_progress(connection: Connection, security_id: str, limit: int = 20) -> list[CorrectionProgress]:
    """The security's latest corrections, open ones first."""
    seqs = [row["seq"] for row in await connection.fetch(_OF_SECURITY, security_id, limit)]
    found = [await correction_progress(connection, seq) for seq in seqs]
    return [each for each in found if each is not None]


def _phase(right: datetime | None, reset: datetime | None, started: datetime | None, *, held: bool) -> Phase:
    if right is not None:
        return "RIGHT"
    if held:
        return "HELD"
    if reset is not None:
        return "VALUING"
    return "RESETTING" if started else "WAITING"


def _rate(keys: int | None, seconds: float | None) -> float | None:
    return keys / seconds if keys and seconds else None


def _eta(keys: int, rate: float | None) -> float | None:
    return 0.0 if keys <= 0 else keys / rate if rate else None
