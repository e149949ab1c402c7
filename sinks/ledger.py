"""The ledger of corrections as readers see it: lists with filters, one correction's reach, a key through its epochs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from sinks.database import Connection
from sinks.progress import PHASE

STATUSES = ("OPEN", "WAITING", "RESETTING", "VALUING", "HELD", "RIGHT")

# One branch each, so that a partial index serves the open ones and the primary key the rest.
_CONDITIONS = {
    "OPEN": "c.right_at is null",
    "WAITING": "c.right_at is null and c.reset_at is null and not c.held and j.status is distinct from 'PROCESSING'",
    "RESETTING": "c.right_at is null and c.reset_at is null and not c.held and j.status = 'PROCESSING'",
    "VALUING": "c.right_at is null and c.reset_at is not null and not c.held",
    "HELD": "c.right_at is null and c.held",
    "RIGHT": "c.right_at is not null",
}

_LIST = f"""
select c.seq, c.security_id, c.earliest_date, c.reason, c.issued_at, c.job_id,
       {PHASE} as status,
       j.status as job_status, j.priority, j.keys_total, j.keys_done, j.started_at, c.reset_at, c.right_at,
       extract(epoch from coalesce(c.right_at, clock_timestamp()) - c.issued_at)::float8 as age_seconds
from corrections c left join reprocessing_jobs j using (job_id)
where ($1::text is null or c.security_id = $1) and ($2::bigint is null or c.seq < $2)
  and ($3::float8 is null or c.issued_at < clock_timestamp() - make_interval(secs => $3)) and %s
order by c.seq desc limit $4
"""

_LARGEST = """
select v.portfolio_id, v.valuation_date, v.quantity, v.market_value, v.epoch, v.watermark_date, v.status,
       v.provisional, v.provisional_from
from current_valuations v
where v.security_id = $1 and v.valuation_date = (select max(business_date) from business_dates)
order by abs(coalesce(v.market_value, v.cost_basis)) desc nulls last
limit $2
"""

_CORRECTED_PRICES = """
select price_date, price_before, price_after from corrected_prices where seq = $1 order by price_date limit $2
"""

_CHANGED_VALUES = """
select portfolio_id, valuation_date, quantity, market_value_before, market_value_after
from correction_values
where seq = $1
order by abs(coalesce(market_value_after, 0) - coalesce(market_value_before, 0)) desc, portfolio_id
limit $2
"""

_MILESTONES = """
select c.triggered_at, j.created_at as job_created_at
from corrections c left join reprocessing_jobs j using (job_id) where c.seq = $1
"""

_EPOCHS = """
select epoch, sequence, transaction_id, position_date, quantity, cost_basis, realized_gain_loss, recorded_at,
       superseded_epoch, superseded_at
from position_history
where portfolio_id = $1 and security_id = $2
order by epoch desc, sequence desc
limit $3
"""

_VALUES = """
select valuation_date, market_value, cost_basis, quantity, price, valuation_status, provisional, provisional_since_seq
from current_valuations
where portfolio_id = $1 and security_id = $2
order by valuation_date desc limit $3
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """What to list: one of STATUSES, a security, corrections that arrived longer ago than so many seconds."""

    status: str | None = None
    security_id: str | None = None
    older_than_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """A row of the list. age_seconds: since arrival, up to now or until it was right."""

    seq: int
    security_id: str
    earliest_date: date
    reason: str
    issued_at: datetime
    job_id: int | None
    status: str
    job_status: str | None
    priority: int | None
    keys_total: int | None
    keys_done: int | None
    started_at: datetime | None
    reset_at: datetime | None
    right_at: datetime | None
    age_seconds: float

    @property
    def reset_eta_seconds(self) -> float | None:
        """Until every holder is reset, at the speed so far; None where that says nothing."""
        if self.status != "RESETTING" or not self.keys_done or not self.keys_total or self.started_at is None:
            return None
        elapsed = (datetime.now(UTC) - self.started_at).total_seconds()
        return max(0.0, elapsed * (self.keys_total - self.keys_done) / self.keys_done)


async def corrections(connection: Connection, wanted: Filter, before: int | None, limit: int) -> list[Correction]:
    """Corrections, newest first. before: only those with a smaller seq (the next page)."""
    condition = _CONDITIONS[wanted.status] if wanted.status else "true"
    rows = await connection.fetch(_LIST % condition, wanted.security_id, before, wanted.older_than_seconds, limit)
    return [Correction(**row) for row in rows]


async def security(connection: Connection, security_id: str) -> dict[str, Any] | None:
    """What is known of a security, or None when nothing is."""
    row = await connection.fetchrow(
        """
        select s.security_id,
               (select count(*) from corrections c where c.security_id = s.security_id and c.right_at is null) as open
        from securities s where s.security_id = $1
        """,
        security_id,
    )
    return dict(row) if row else None


async def largest_holders(connection: Connection, security_id: str, limit: int = 10) -> list[dict[str, Any]]:
    """The portfolios with the most at stake at L."""
    return [dict(row) for row in await connection.fetch(_LARGEST, security_id, limit)]


async def corrected_prices(connection: Connection, seq: int, limit: int = 100) -> list[dict[str, Any]]:
    """What a late price replaced: price_date, price_before (None: there was none), price_after, in order."""
    return [dict(row) for row in await connection.fetch(_CORRECTED_PRICES, seq, limit)]


async def changed_values(connection: Connection, seq: int, limit: int = 10) -> list[dict[str, Any]]:
    """What the books had said of the keys that changed most, and said then, on the first date that changed of each.

    There are at most ten, and none before a key has been valued: what is told is kept as it was.
    """
    return [dict(row) for row in await connection.fetch(_CHANGED_VALUES, seq, limit)]


async def milestones(connection: Connection, seq: int) -> dict[str, datetime | None]:
    """When the correction's trigger went out and when its job was made; None for what has not happened."""
    row = await connection.fetchrow(_MILESTONES, seq)
    return dict(row) if row else {"triggered_at": None, "job_created_at": None}


async def epochs(connection: Connection, portfolio_id: str, security_id: str, limit: int = 500) -> list[dict[str, Any]]:
    """The key's history rows of all epochs that are kept, latest epoch and place first."""
    return [dict(row) for row in await connection.fetch(_EPOCHS, portfolio_id, security_id, limit)]


async def daily_values(
    connection: Connection, portfolio_id: str, security_id: str, limit: int = 260
) -> list[dict[str, Any]]:
    """The key's latest snapshots in order of their dates, each with whether it is provisional and since which seq."""
    rows = await connection.fetch(_VALUES, portfolio_id, security_id, limit)
    return [dict(row) for row in reversed(rows)]


async def prices_around(connection: Connection, security_id: str, day: date, limit: int = 8) -> list[dict[str, Any]]:
    """The security's prices from just before the day on, in order."""
    rows = await connection.fetch(
        """
        select price_date, price, currency, revision from market_prices
        where security_id = $1 and price_date >= coalesce(
            (select max(price_date) from market_prices where security_id = $1 and price_date < $2), $2)
        order by price_date limit $3
        """,
        security_id,
        day,
        limit,
    )
    return [dict(row) for row in rows]
