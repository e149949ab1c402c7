"""What the demo shows while a correction runs: progress figures and one key's row."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from sinks.database import Connection

_PROGRESS = """
    select (select count(*) from transactions) as transactions,
           (select count(*) from market_prices) as prices,
           (select max(business_date) from business_dates) as latest,
           (select count(*) from business_dates) as dates,
           (select count(*) from position_state) as keys,
           (select count(*) from dirty_keys) as dirty,
           (select count(*) from position_state
            where watermark_date < (select max(business_date) from business_dates)) as behind,
           (select count(*) from position_state where status = 'REPROCESSING') as reprocessing,
           (select count(*) from corrections where right_at is null) as corrections,
           (select coalesce(sum(epoch), 0) from position_state) as epochs
"""
_JOB = """
    select job_id, security_id, earliest_impacted_date, status, keys_total, keys_done
    from reprocessing_jobs where security_id = $1 order by job_id desc limit 1
"""
_KEY = """
    select s.epoch, s.watermark_date, s.status, v.valuation_date, v.quantity, v.cost_basis, v.price,
           v.market_value, v.unrealized_gain_loss, v.valuation_status
    from position_state s
    left join daily_position_snapshots v
        on v.security_id = s.security_id and v.portfolio_id = s.portfolio_id and v.valuation_date = $3
    where s.portfolio_id = $1 and s.security_id = $2
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts over the whole database at one moment; epochs: the sum over all keys."""

    transactions: int
    prices: int
    latest: date | None
    dates: int
    keys: int
    dirty: int
    behind: int
    reprocessing: int
    corrections: int
    epochs: int


async def read_progress(connection: Connection) -> Progress:
    """Where the books stand now."""
    row = await connection.fetchrow(_PROGRESS)
    assert row is not None
    return Progress(**dict(row))


async def read_job(connection: Connection, security_id: str) -> dict[str, Any] | None:
    """The newest reset job of a security, if it ever had one."""
    row = await connection.fetchrow(_JOB, security_id)
    return dict(row) if row else None


async def read_key(connection: Connection, portfolio_id: str, security_id: str, day: date) -> dict[str, Any] | None:
    """A key's state and its snapshot of one date (null columns if it has none); None for an unknown key."""
    row = await connection.fetchrow(_KEY, portfolio_id, security_id, day)
    return dict(row) if row else None
