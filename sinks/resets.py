"""The watermark sink: pull back the watermark of every holder of a security, chunk by chunk (design, Watermark sink).

Every chunk runs inside a fenced transaction and compare-and-swaps the job's cursor: a zombie cannot move it back.
Lock first, filter second: no statement here looks at a watermark to decide which rows it updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import asyncpg

from sinks import corrections
from sinks.booking import day_before
from sinks.database import Connection
from sinks.model import Job

TERMINAL = frozenset({"COMPLETE", "FAILED", "CANCELLED"})

# Holders on the date before, or anyone who moved on or after it.
_AFFECTED = """
exists (select from position_history h
        where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null
          and h.position_date >= $2)
or coalesce((select h.quantity from position_history h
             where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null
               and h.position_date < $2
             order by h.position_date desc, h.sequence desc limit 1), 0) <> 0
"""

_INSERT = """
insert into reprocessing_jobs (job_id, job_type, security_id, earliest_impacted_date, seq, status, created_at)
select * from unnest($1::bigint[], $2::text[], $3::text[], $4::date[], $5::bigint[], $6::text[], $7::timestamptz[])
    as job (job_id)
order by job_id
on conflict do nothing
"""

_COLUMNS = "job_id, security_id, earliest_impacted_date, seq, status, cursor_portfolio_id, keys_total, keys_done"

_READ = f"select {_COLUMNS} from reprocessing_jobs where job_id = any($1::bigint[]) order by job_id"

_COUNT = f"select count(*) from position_state s where s.security_id = $1 and ({_AFFECTED})"

_START = """
update reprocessing_jobs set keys_total = $2, status = 'PROCESSING', started_at = clock_timestamp()
where job_id = $1 and status = 'PENDING'
returning 1
"""

# Held ones are no reason to run: a trigger that comes again must not undo a cancel.
_ADOPT = """
update corrections set job_id = $4
where security_id = $1 and seq <= $2 and earliest_date >= $3 and right_at is null and reset_at is null and not held
returning seq
"""

_BOUNDARY = """
select portfolio_id from position_state
where security_id = $1 and portfolio_id > $2
order by portfolio_id offset $3 limit 1
"""

_MOVE_CURSOR = """
update reprocessing_jobs set cursor_portfolio_id = coalesce($3, cursor_portfolio_id)
where job_id = $1 and cursor_portfolio_id = $2 and status = 'PROCESSING'
returning 1
"""

# LEAST is computed on the row as it is after the wait for its lock. The scan settings keep locks in key order.
_RESET = f"""
update position_state s set
    watermark_date = least(s.watermark_date, $2::date - 1),
    reset_seq = least(s.reset_seq, $3),
    status = 'REPROCESSING'
where s.security_id = $1 and s.portfolio_id > $4 and %s and ({_AFFECTED})
"""
_RESET_TO = _RESET % "s.portfolio_id <= $5"
_RESET_REST = _RESET % "$5::text is null"

_SMALLEST_SEQ = """
select coalesce(min(seq), $2) from corrections
where security_id = $1 and seq <= $2 and earliest_date >= $3 and right_at is null and reset_at is null
"""

_LOWER = "update securities set valued_through = least(valued_through, $2) where security_id = $1"

_FINISH = """
update reprocessing_jobs set status = $2, failure_reason = $3, finished_at = clock_timestamp()
where job_id = $1 and status in ('PENDING', 'PROCESSING')
returning 1
"""

_SETTLE_LEDGER = """
update corrections set
    reset_at = case when $4 then clock_timestamp() else reset_at end,
    held = not $4
where security_id = $1 and seq <= $2 and earliest_date >= $3 and right_at is null and reset_at is null
"""

_ANNOUNCE = """
insert into outbox_events (topic, message_key, value)
select 'reprocessing-status', convert_to(security_id, 'UTF8'), convert_to(jsonb_build_object(
    'job_id', job_id, 'security_id', security_id, 'status', status, 'keys_total', keys_total, 'keys_done', keys_done,
    'failure_reason', failure_reason, 'at', clock_timestamp())::text, 'UTF8')
from reprocessing_jobs where job_id = any($1::bigint[])
order by job_id
"""


class JobMoved(Exception):  # noqa: N818 - an outcome
    """The job is not where it was read: cancelled, or moved by another. Read it again."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job as it is stored. cursor: the last portfolio_id that is done."""

    job_id: int
    security_id: str
    earliest_impacted_date: date
    seq: int
    status: str
    cursor: str
    keys_total: int | None
    keys_done: int

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in TERMINAL

    @property
    def keys_left(self) -> int:
        """Holders still to be reset, as counted at the start."""
        return max(0, (self.keys_total or 0) - self.keys_done)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk did, and the job after it."""

    job: OpenJob
    keys_reset: int


async def open_jobs(connection: Connection, jobs: Sequence[Job]) -> list[OpenJob]:
    """Record the jobs and start them; answer every one with its status, finished ones too.

    A job whose corrections are all reset already is COMPLETE at once. May be repeated.
    """
    ids = [job.job_id for job in jobs]
    await connection.execute(
        _INSERT,
        ids,
        [job.job_type for job in jobs],
        [job.security_id for job in jobs],
        [job.earliest_impacted_date for job in jobs],
        [job.seq for job in jobs],
        ["PENDING"] * len(jobs),
        [job.created_at for job in jobs],
    )
    waiting = [job for job in await _read(connection, ids) if job.status == "PENDING"]
    counted = {
        job.job_id: await connection.fetchval(_COUNT, job.security_id, job.earliest_impacted_date) for job in waiting
    }
    await corrections.lock_securities(connection, [job.security_id for job in jobs])
    for job in waiting:
        await connection.execute(_START, job.job_id, counted[job.job_id])
        covered = await connection.fetch(_ADOPT, job.security_id, job.seq, job.earliest_impacted_date, job.job_id)
        if not covered:
            await connection.execute(_FINISH, job.job_id, "COMPLETE", None)
    await connection.execute(_ANNOUNCE, ids)
    return await _read(connection, ids)


async def reset_chunk(connection: Connection, job: OpenJob, scan: int) -> Chunk:
    """Reset the holders among the next `scan` keys of the security; the last chunk completes the job.

    Raises JobMoved when the job is no longer where `job` says.
    """
    security, day, seq = job.security_id, job.earliest_impacted_date, job.seq
    boundary = await connection.fetchval(_BOUNDARY, security, job.cursor, scan - 1)
    if await connection.fetchval(_MOVE_CURSOR, job.job_id, job.cursor, boundary) is None:
        raise JobMoved
    await connection.execute("set local enable_seqscan = off; set local enable_bitmapscan = off")
    smallest = await connection.fetchval(_SMALLEST_SEQ, security, seq, day)
    tag = await connection.execute(
        _RESET_REST if boundary is None else _RESET_TO, security, day, smallest, job.cursor, boundary
    )
    keys = int(tag.split()[-1])
    await connection.execute(
        "update reprocessing_jobs set keys_done = keys_done + $2 where job_id = $1", job.job_id, keys
    )
    await corrections.lock_securities(connection, [security])
    await connection.execute(_LOWER, security, day_before(day))
    if boundary is None:
        await _finish(connection, job, "COMPLETE", None)
    (after,) = await _read(connection, [job.job_id])
    return Chunk(after, keys)


async def fail(connection: Connection, job: OpenJob, reason: str) -> OpenJob:
    """Give the job up: terminal, its corrections are held and visibly stale."""
    await corrections.lock_securities(connection, [job.security_id])
    await _finish(connection, job, "FAILED", reason)
    (after,) = await _read(connection, [job.job_id])
    return after


async def note_attempt(connection: Connection, job: OpenJob) -> int:
    """Count a failed attempt; returns how many there were."""
    count: int = await connection.fetchval(
        "update reprocessing_jobs set attempt_count = attempt_count + 1 where job_id = $1 returning attempt_count",
        job.job_id,
    )
    return count


async def reread(connection: Connection, job: OpenJob) -> OpenJob:
    """The job as it is now, answered with its status."""
    await corrections.lock_securities(connection, [job.security_id])
    await connection.execute(_ANNOUNCE, [job.job_id])
    (after,) = await _read(connection, [job.job_id])
    return after


async def _finish(connection: Connection, job: OpenJob, status: str, reason: str | None) -> None:
    if await connection.fetchval(_FINISH, job.job_id, status, reason):  # repeated, it must not hold what was released
        await connection.execute(
            _SETTLE_LEDGER, job.security_id, job.seq, job.earliest_impacted_date, status == "COMPLETE"
        )
    await connection.execute(_ANNOUNCE, [job.job_id])


async def _read(connection: Connection, ids: Sequence[int]) -> list[OpenJob]:
    return [_job(row) for row in await connection.fetch(_READ, list(ids))]


def _job(row: asyncpg.Record) -> OpenJob:
    return OpenJob(*row.values())
