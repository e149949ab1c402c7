"""What only Postgres knows about the state of the books, for gauges and the web view."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from sinks import calendar
from sinks.database import Connection

_LEDGER = """
select (select max(business_date) from business_dates) as business_date,
       count(distinct security_id) filter (where reset_at is null and not held) as triggers_pending,
       count(*) as corrections_open,
       count(*) filter (where held) as corrections_held,
       coalesce(extract(epoch from clock_timestamp() - min(issued_at) filter (where not held)), 0)::float8
           as oldest_correction_seconds,
       (select count(*) from position_history where superseded_epoch is null and out_of_range)
           as transactions_out_of_range
from corrections where right_at is null
"""

# Only securities with work due, or with corrections that are not reset, are looked into, so that quiet books cost
# nothing however many keys there are. L is an argument: the plan is one for as many securities as are behind it.
_KEYS = """
with concerned as materialized (
    select security_id from securities where valued_through < $1::date union select security_id from reach
), dirty as (
    select k.watermark_date, k.provisional_from, count(*) as keys,
           count(*) filter (where k.status = 'REPROCESSING') as active
    from concerned join dirty_keys k using (security_id)
    group by k.watermark_date, k.provisional_from
)
select coalesce(sum(active), 0)::bigint as active_keys,
       coalesce(sum(keys), 0)::bigint as dirty_keys,
       coalesce(sum(keys * (select count(*) from business_dates d where d.business_date >= provisional_from)),
                0)::bigint as dirty_snapshots,
       greatest(0, coalesce($1 - min(greatest(watermark_date, date '1899-12-31')), 0)) as gap_days
from dirty
"""

_KEY = """
select k.portfolio_id, k.security_id, k.epoch, k.watermark_date, k.status,
       case when d.portfolio_id is not null then k.provisional_from end as provisional_from
from key_finality k left join dirty_keys d using (security_id, portfolio_id)
where k.portfolio_id = $1 and k.security_id = $2
"""

_HISTORY = """
select transaction_id, position_date, epoch, sequence, quantity, cost_basis, realized_gain_loss
from position_history
where portfolio_id = $1 and security_id = $2 and superseded_epoch is null
  and ($3::bigint is null or sequence < $3)
order by sequence desc limit $4
"""


@dataclass(frozen=True, slots=True)
class Gauges:
    """The backlog at one moment.

    triggers_pending: securities with corrections not reset. oldest_correction_seconds: age of the oldest one that is
    neither right nor held. active_keys: keys REPROCESSING. dirty_keys, dirty_snapshots: what is provisional up to
    business_date (L), as the view dirty_keys has it. gap_days: from the oldest watermark of a dirty key to L.
    transactions_out_of_range: those that would take a quantity beyond its limit, and change nothing.
    """

    triggers_pending: int
    corrections_open: int
    corrections_held: int
    oldest_correction_seconds: float
    business_date: date | None
    active_keys: int
    dirty_keys: int
    dirty_snapshots: int
    gap_days: int
    transactions_out_of_range: int = 0  # a worker of the version before may have counted the rest


async def read_ledger(connection: Connection) -> dict[str, Any]:
    """The part of Gauges that is cheap to count; cost: the open corrections, and what is out of range."""
    row = await connection.fetchrow(_LEDGER)
    assert row is not None
    return dict(row)


async def count_keys(connection: Connection) -> dict[str, Any]:
    """The other part; cost: the keys of securities with work due. In a transaction, of which it changes settings."""
    await connection.execute("set local max_parallel_workers_per_gather = 0")  # cheap rather than quick
    await connection.execute(
        "set local plan_cache_mode = force_custom_plan; set local enable_mergejoin = off"
    )  # no sort
    row = await connection.fetchrow(_KEYS, await calendar.latest_closed(connection))
    assert row is not None
    return dict(row)


async def read_positions(connection: Connection) -> dict[tuple[str, str, int], int]:
    """The next offset of every exactly-once sink, by (consumer_group, topic, partition)."""
    rows = await connection.fetch("select consumer_group, topic, partition, next_offset from kafka_offsets")
    return {(row["consumer_group"], row["topic"], row["partition"]): row["next_offset"] for row in rows}


async def read_key(
    connection: Connection, portfolio_id: str, security_id: str, *, before: int | None = None, limit: int
) -> dict[str, Any] | None:
    """One key with the latest rows of its live history, or None. before: only rows with a smaller sequence.

    provisional_from: its first business date up to L that is not final; None where all are.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        state = await connection.fetchrow(_KEY, portfolio_id, security_id)
        if state is None:
            return None
        history = await connection.fetch(_HISTORY, portfolio_id, security_id, before, limit)
    return {**state, "history": [dict(row) for row in reversed(history)]}
