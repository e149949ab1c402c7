"""The watermark sink: pull back the watermark of every holder of a security, chunk by chunk (design, Watermark sink).

Every chunk runs inside a fenced transaction and compare-and-swaps the job's (cursor, status): a zombie cannot move it
back, and a job that an operator has cancelled goes no further. Lock first, filter second: no statement here looks at a
watermark to decide which rows it updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import asyncpg

from sinks import corrections, statuses
from sinks.database import BY_INDEX, Connection
from sinks.holders import affected, last_held_before
from sinks.model import Job

TERMINAL = frozenset({"COMPLETE", "FAILED", "CANCELLED"})

_COLUMNS = (
    "job_id, security_id, earliest_impacted_date, seq, status, cursor_portfolio_id, keys_total, keys_done, priority, "
    "created_at"
)

_INSERT = """
insert into reprocessing_jobs (job_id, job_type, security_id, earliest_impacted_date, seq, status, created_at)
select job_id, job_type, security_id, day, seq, 'PENDING', created_at
from unnest($1::bigint[], $2::text[], $3::text[], $4::date[], $5::bigint[], $6::timestamptz[])
    as job (job_id, job_type, security_id, day, seq, created_at)
order by job_id
on conflict do nothing
"""

# "status || ''" keeps off the index that begins with the status, here and below. Before version 17 Postgres may look
# for the jobs in all that are open, where statistics lag and know of few.
_COUNT = f"""
update reprocessing_jobs j set keys_total = (
    select count(*)
    from (select {last_held_before("j.earliest_impacted_date")} as since) as held, position_state s
    where s.security_id = j.security_id and {affected("s", "held.since")})
where job_id = any($1::bigint[]) and status || '' = 'PENDING' and keys_total is null
"""

# The open corrections that a job covers, no others: a hole cannot hide behind a high-water mark. Always looked up job
# by job, by the security ("+ 0" keeps off the primary key): a plan made while statistics lag behind a herd of
# corrections must not walk all of them for each job.
_COVERED = """
c.security_id = j.security_id and c.seq + 0 <= j.seq and c.earliest_date >= j.earliest_impacted_date
and c.right_at is null and c.reset_at is null
"""

_ADOPT = f"""
update corrections set job_id = adopted.job_id
from (
    select j.job_id, c.seq
    from (select * from reprocessing_jobs
          where job_id = any($1::bigint[]) and status || '' in ('PENDING', 'PROCESSING') offset 0) as j
    cross join lateral (
        select seq from corrections c
        where {_COVERED} and not c.held and c.job_id is distinct from j.job_id offset 0) as c
) as adopted
where corrections.seq = adopted.seq
"""

# Held ones are no reason to run: a trigger that comes again must not undo a cancel.
_NEEDLESS = f"""
update reprocessing_jobs j set status = 'COMPLETE', keys_total = keys_done, finished_at = clock_timestamp()
where job_id = any($1::bigint[]) and status || '' in ('PENDING', 'PROCESSING')
  and (select 1 from corrections c where {_COVERED} and not c.held limit 1) is null
"""

# Before the securities' rows: an operator's action on a job takes the two in this order.
_HOLD = """
select from reprocessing_jobs where job_id = any($1::bigint[]) order by job_id for no key update
"""

_READ = f"select {_COLUMNS} from reprocessing_jobs where job_id = any($1::bigint[]) order by job_id"

# "+ 0" here too: else the first one of all may be looked for by walking the ledger in order of seq.
_FIRST_SEQ = f"coalesce((select min(c.seq + 0) from corrections c where {_COVERED}), j.seq)"

# The place where the chunk ends; null at the end of the security. A chunk between the first and the last need not wait
# for the disk: a crash of the server that loses it loses its cursor too, and what follows from it (the next chunks, a
# valuation) cannot be on disk without it. The first and the last announce: an event_id must not be drawn again.
_STEP = f"""
with planner as materialized ({BY_INDEX}), boundary as materialized (
    select portfolio_id from position_state
    where security_id = $2 and portfolio_id > $3
    order by portfolio_id offset $4 limit 1
)
update reprocessing_jobs j set
    cursor_portfolio_id = coalesce((select portfolio_id from boundary), cursor_portfolio_id),
    status = 'PROCESSING', started_at = coalesce(started_at, clock_timestamp()), next_attempt_at = null
from planner
where job_id = $1 and cursor_portfolio_id = $3 and status in ('PENDING', 'PROCESSING')
returning (select portfolio_id from boundary) as boundary, {_FIRST_SEQ} as seq,
    {last_held_before("j.earliest_impacted_date")} as since,
    case when $3 <> '' and exists (select from boundary) then set_config('synchronous_commit', 'off', true) end
"""

# LEAST is computed on the row as it is after the wait for its lock.
PULL_BACK = """
watermark_date = least(s.watermark_date, {day} - 1), reset_seq = least(s.reset_seq, {seq}), status = 'REPROCESSING'
"""

_RESET = f"""
update position_state s set {PULL_BACK.format(day="$2::date", seq="$3")}
where s.security_id = $1 and s.portfolio_id > $5 and %s and {affected("s", "$4")}
"""
_RESET_TO = _RESET % "s.portfolio_id <= $6"
_RESET_REST = _RESET % "$6::text is null"

_AFTER_STEP = f"""
with lowered as (
    update securities set valued_through = least(valued_through, $3::date - 1) where security_id = $2
)
update reprocessing_jobs set keys_done = keys_done + $4, keys_total = greatest(keys_total, keys_done + $4)
where job_id = $1
returning {_COLUMNS}
"""

# Small jobs, in one go. One job per security: two would update a key twice, and one of them would be lost.
_TAKE_SMALL = f"""
with planner as materialized ({BY_INDEX})
select job_id from reprocessing_jobs, planner
where job_id = any($1::bigint[]) and cursor_portfolio_id = '' and status || '' in ('PENDING', 'PROCESSING')
order by job_id
for no key update of reprocessing_jobs
"""

_RESET_SMALL = f"""
with jobs as materialized (
    select job_id, security_id, earliest_impacted_date as day, {_FIRST_SEQ} as seq,
           {last_held_before("j.earliest_impacted_date")} as since
    from reprocessing_jobs j where job_id = any($1::bigint[])
    order by security_id
), reset as (
    update position_state s set {PULL_BACK.format(day="j.day", seq="j.seq")}
    from jobs j where s.security_id = j.security_id and {affected("s", "j.since")}
    returning j.job_id
)
select job_id, count(*) as keys from reset group by job_id
"""

# The caller holds the jobs and then the securities; so nothing else settles these corrections meanwhile.
_END = f"""
with done as materialized (
    select j.*, $4::bigint[] is not null as counted, coalesce(counts.keys, 0) as keys
    from reprocessing_jobs j left join unnest($1::bigint[], $4::bigint[]) as counts (job_id, keys) using (job_id)
    where j.job_id = any($1::bigint[]) and j.status || '' in ('PENDING', 'PROCESSING')
), ledger as (
    update corrections set
        reset_at = case when $2 = 'COMPLETE' then clock_timestamp() else reset_at end,
        held = $2 <> 'COMPLETE',
        job_id = settled.job_id
    from (
        select j.job_id, c.seq
        from done j cross join lateral (select seq from corrections c where {_COVERED} offset 0) as c
    ) as settled
    where corrections.seq = settled.seq
), lowered as (
    update securities d set valued_through = least(valued_through, j.earliest_impacted_date - 1)
    from done j where j.keys > 0 and d.security_id = j.security_id
)
update reprocessing_jobs j set
    status = $2, failure_reason = $3,
    started_at = case when $2 = 'COMPLETE' then coalesce(j.started_at, clock_timestamp()) else j.started_at end,
    finished_at = clock_timestamp(), next_attempt_at = null,
    keys_done = case when done.counted then done.keys else j.keys_done end,
    keys_total = case when $2 <> 'COMPLETE' then j.keys_total when done.counted then done.keys else j.keys_done end
from done where j.job_id = done.job_id
returning {", ".join(f"j.{name}" for name in _COLUMNS.split(", "))}
"""

_ANNOUNCE = statuses.announce("from reprocessing_jobs where job_id = any($1::bigint[])")

_NOTE_ATTEMPT = """
update reprocessing_jobs set
    attempt_count = attempt_count + 1, failure_reason = $2,
    next_attempt_at = clock_timestamp() + make_interval(secs => $3 * 2 ^ attempt_count)
where job_id = $1
returning attempt_count, extract(epoch from next_attempt_at - clock_timestamp())::float8 as wait_seconds
"""

_PRIORITIES = (
    "select job_id, priority from reprocessing_jobs where status in ('PENDING', 'PROCESSING') and priority <> 0"
)


# A number that is another security's would keep that one's job from being recorded; so would a date that is later than
# the correction's. Each is looked up by the primary key.
_ISSUED = """
select job_id
from unnest($1::bigint[], $2::text[], $3::date[], $4::bigint[]) as job (job_id, security_id, day, seq)
where job_id = seq and (select c.security_id = job.security_id and c.earliest_date >= job.day
                        from corrections c where c.seq = job.job_id)
"""

_REFUSE = statuses.announce(
    "from unnest($1::bigint[], $2::text[]) as job (job_id, security_id)",
    of_no_job=("CANCELLED", "the ledger has issued no such correction"),
)


class JobMoved(Exception):  # noqa: N818 - an outcome
    """The job is not where it was read: cancelled, or moved by another. Read it again."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job as it is stored. cursor: the last portfolio_id that is done; priority: higher goes first."""

    job_id: int
    security_id: str
    earliest_impacted_date: date
    seq: int
    status: str
    cursor: str
    keys_total: int | None
    keys_done: int
    priority: int
    created_at: datetime

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


@dataclass(frozen=True, slots=True)
class SmallChunk:
    """What one chunk of small jobs did, and all its jobs after it, those included that were moved by others."""

    jobs: Sequence[OpenJob]
    keys_reset: int


async def issued(connection: Connection, jobs: Sequence[Job]) -> set[int]:
    """The ids of those jobs that stand for a correction of their security."""
    rows = await connection.fetch(
        _ISSUED,
        [job.job_id for job in jobs],
        [job.security_id for job in jobs],
        [job.earliest_impacted_date for job in jobs],
        [job.seq for job in jobs],
    )
    return {row["job_id"] for row in rows}


async def refuse(connection: Connection, jobs: Sequence[Job]) -> None:
    """Answer jobs that are not recorded as cancelled: a table that holds one of them in flight lets go of it."""
    await connection.execute(_REFUSE, [job.job_id for job in jobs], [job.security_id for job in jobs])


async def open_jobs(connection: Connection, jobs: Sequence[Job]) -> list[OpenJob]:
    """Record the jobs and count their keys; answer every one with its status, finished ones too.

    A job whose corrections are all reset already is COMPLETE at once. May be repeated.
    """
    ids = [job.job_id for job in jobs]
    await connection.execute(BY_INDEX)
    await connection.execute(
        _INSERT,
        ids,
        [job.job_type for job in jobs],
        [job.security_id for job in jobs],
        [job.earliest_impacted_date for job in jobs],
        [job.seq for job in jobs],
        [job.created_at for job in jobs],
    )
    await connection.execute(_HOLD, ids)
    await connection.execute(_COUNT, ids)
    await corrections.lock_securities(connection, [job.security_id for job in jobs])
    await connection.execute(_ADOPT, ids)
    await connection.execute(_NEEDLESS, ids)
    await connection.execute(_ANNOUNCE, ids)
    return await read(connection, ids)


async def reset_chunk(connection: Connection, job: OpenJob, scan: int) -> Chunk:
    """Reset the holders among the next `scan` keys of the security; the last chunk completes the job.

    Raises JobMoved when the job is no longer where `job` says.
    """
    security, day = job.security_id, job.earliest_impacted_date
    step = await connection.fetchrow(_STEP, job.job_id, security, job.cursor, scan - 1)
    if step is None:
        raise JobMoved
    boundary = step["boundary"]
    tag = await connection.execute(
        _RESET_REST if boundary is None else _RESET_TO, security, day, step["seq"], step["since"], job.cursor, boundary
    )
    keys = int(tag.split()[-1])
    after = await connection.fetchrow(_AFTER_STEP, job.job_id, security, day, keys)
    if boundary is None:
        (after,) = await end_jobs(connection, [job.job_id], "COMPLETE")
    elif job.cursor == "":  # the first chunk, since each moves the cursor
        await connection.execute(_ANNOUNCE, [job.job_id])
    assert after is not None
    return Chunk(after if isinstance(after, OpenJob) else _job(after), keys)


async def reset_small(connection: Connection, jobs: Sequence[OpenJob]) -> SmallChunk:
    """Reset all holders of all these jobs and complete them. None of them has begun; one job per security."""
    asked = [job.job_id for job in jobs]
    ids = [row["job_id"] for row in await connection.fetch(_TAKE_SMALL, asked)]
    counted = {row["job_id"]: row["keys"] for row in await connection.fetch(_RESET_SMALL, ids)}
    await corrections.hold_securities(connection, [job.security_id for job in jobs])
    done = await end_jobs(connection, ids, "COMPLETE", keys=[counted.get(job_id, 0) for job_id in ids])
    moved = sorted(set(asked) - set(ids))
    return SmallChunk([*done, *(await answer(connection, moved) if moved else [])], sum(counted.values()))


async def fail(connection: Connection, job: OpenJob, reason: str) -> OpenJob:
    """Give the job up: terminal, its corrections are held and visibly stale."""
    await connection.execute(_HOLD, [job.job_id])
    await corrections.hold_securities(connection, [job.security_id])
    await end_jobs(connection, [job.job_id], "FAILED", reason)
    (after,) = await read(connection, [job.job_id])
    return after


async def end_jobs(
    connection: Connection,
    ids: Sequence[int],
    status: str,
    reason: str | None = None,
    keys: Sequence[int] | None = None,
) -> list[OpenJob]:
    """COMPLETE: the corrections are reset. FAILED, CANCELLED: they are held. Returns the jobs that were still open.

    keys: reset by this transaction for each of the jobs, where that is all they have. The caller holds the securities'
    rows, after the jobs'.
    """
    rows = await connection.fetch(_END, list(ids), status, reason, keys)
    await connection.execute(_ANNOUNCE, list(ids))
    return [_job(row) for row in rows]


async def note_attempt(connection: Connection, job: OpenJob, reason: str, pause_seconds: float) -> tuple[int, float]:
    """Count a failed attempt; returns how many there were, and the seconds until the next (doubled each time)."""
    row = await connection.fetchrow(_NOTE_ATTEMPT, job.job_id, reason, pause_seconds)
    assert row is not None
    return row["attempt_count"], row["wait_seconds"]


async def answer(connection: Connection, ids: Sequence[int]) -> list[OpenJob]:
    """The jobs as they are now, each answered with its status."""
    jobs = await read(connection, ids)
    await corrections.hold_securities(connection, [job.security_id for job in jobs])
    await connection.execute(_ANNOUNCE, list(ids))
    return jobs


async def read(connection: Connection, ids: Sequence[int]) -> list[OpenJob]:
    """The jobs as they are now, by id."""
    return [_job(row) for row in await connection.fetch(_READ, list(ids))]


async def priorities(connection: Connection) -> Mapping[int, int]:
    """Priority by job_id of the open jobs that an operator has given one; every other has 0."""
    return {row["job_id"]: row["priority"] for row in await connection.fetch(_PRIORITIES)}


def _job(row: asyncpg.Record) -> OpenJob:
    return OpenJob(*row.values())
