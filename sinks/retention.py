"""Retention: superseded history and finished jobs go by age, in small steps that hold up nobody.

Published outbox rows are removed when they are acknowledged. For each key that loses superseded history its horizon is
kept, so that a question from before it is refused.
"""

from __future__ import annotations

from datetime import timedelta

from sinks.database import Connection

ROWS = 1_000
"""What one step removes at most."""

_PURGE_HISTORY = """
with old as (
    select security_id, portfolio_id, epoch, sequence from position_history
    where superseded_epoch is not null and superseded_at < clock_timestamp() - $1::interval
    order by superseded_at
    limit $2
    for update skip locked
), removed as (
    delete from position_history h using old
    where h.security_id = old.security_id and h.portfolio_id = old.portfolio_id and h.epoch = old.epoch
      and h.sequence = old.sequence
    returning h.security_id, h.portfolio_id, h.superseded_at, h.superseded_epoch
), horizons as (
    insert into history_horizons as known (security_id, portfolio_id, complete_since, first_epoch)
    select security_id, portfolio_id, max(superseded_at), max(superseded_epoch) from removed
    group by security_id, portfolio_id
    order by security_id, portfolio_id
    on conflict (security_id, portfolio_id) do update set
        complete_since = greatest(known.complete_since, excluded.complete_since),
        first_epoch = greatest(known.first_epoch, excluded.first_epoch)
)
select count(*) from removed
"""

# A job whose corrections are held, or not right yet, is still needed.
_PURGE_JOBS = """
with old as (
    select job_id from reprocessing_jobs j
    where status in ('COMPLETE', 'FAILED', 'CANCELLED') and finished_at < clock_timestamp() - $1::interval
      and not exists (select from corrections c
                      where c.security_id = j.security_id and c.job_id = j.job_id and c.right_at is null)
    order by job_id
    limit $2
    for update skip locked
), removed as (
    delete from reprocessing_jobs j using old where j.job_id = old.job_id returning j.job_id
)
select count(*) from removed
"""


async def purge_history(connection: Connection, age: timedelta, rows: int = ROWS) -> int:
    """Remove rows of history superseded longer ago than `age`, the oldest first; returns how many."""
    count: int = await connection.fetchval(_PURGE_HISTORY, age, rows)
    return count


async def purge_jobs(connection: Connection, age: timedelta, rows: int = ROWS) -> int:
    """Remove jobs finished longer ago than `age` whose corrections are right; returns how many."""
    count: int = await connection.fetchval(_PURGE_JOBS, age, rows)
    return count
