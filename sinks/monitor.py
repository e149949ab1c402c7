"""What only Postgres knows about the state of the books, for gauges and the web view."""

from __future__ import annotations

from dataclasses import dataclass

from sinks.database import Connection

_GAUGES = """
with latest as (select max(business_date) as business_date from business_dates)
select (select count(distinct security_id) from corrections
        where right_at is null and reset_at is null and not held) as triggers_pending,
       (select count(*) from position_state where status = 'REPROCESSING') as active_keys,
       coalesce((select latest.business_date - min(greatest(watermark_date, date '1899-12-31'))
                 from position_state, latest
                 where watermark_date < latest.business_date
                 group by latest.business_date), 0) as gap_days
"""

_KEY = """
select portfolio_id, security_id, epoch, watermark_date, status
from position_state
where portfolio_id = $1 and security_id = $2
"""

_HISTORY = """
select transaction_id, position_date, epoch, sequence, quantity, cost_basis, realized_gain_loss
from position_history
where portfolio_id = $1 and security_id = $2 and superseded_epoch is null
order by sequence
"""


@dataclass(frozen=True, slots=True)
class Gauges:
    """Securities with corrections not reset; keys REPROCESSING; days from the oldest watermark to L."""

    triggers_pending: int
    active_keys: int
    gap_days: int


async def read_gauges(connection: Connection) -> Gauges:
    """One look at the backlog."""
    row = await connection.fetchrow(_GAUGES)
    assert row is not None
    return Gauges(row["triggers_pending"], row["active_keys"], row["gap_days"])


async def read_key(connection: Connection, portfolio_id: str, security_id: str) -> dict[str, object] | None:
    """One key with its live history (contract, Web: Keys), or None."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        state = await connection.fetchrow(_KEY, portfolio_id, security_id)
        if state is None:
            return None
        history = await connection.fetch(_HISTORY, portfolio_id, security_id)
    return {**state, "history": [dict(row) for row in history]}


async def read_jobs(connection: Connection, limit: int) -> list[dict[str, object]]:
    """The latest jobs, newest first."""
    rows = await connection.fetch(
        """
        select job_id, job_type, security_id, earliest_impacted_date, seq, status, attempt_count, failure_reason,
               keys_total, keys_done, created_at, started_at, finished_at
        from reprocessing_jobs order by job_id desc limit $1
        """,
        limit,
    )
    return [dict(row) for row in rows]
