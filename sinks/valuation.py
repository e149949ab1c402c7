"""The valuation: recompute the dirty dates of dirty keys, short transaction by short transaction (design, section 3).

The watermark is the only truth about what is to be done; nothing is in flight outside a transaction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from sinks import calendar, corrections, settling
from sinks.claims import PLAN_FOR_THESE, SECURITIES_AT_ONCE, Claims
from sinks.database import BY_INDEX, Connection, Pool

_SWEEP_SECONDS = 1.0  # for corrections that left no key to value

# A snapshot of its own: the claim's may be older than the price that the reset was for. Per key: the last history row
# up to the business date before the first dirty one, and all after it, as ranges of dates; several rows of one date
# leave empty ranges, but for the last. `previous` is the quantity at the end of the business date before.
# Joins of intermediate results are FULL, with a filter that the planner does not see through: they can only be hashed
# or merged, where an estimate of one row would make a nested loop of thousands by tens of thousands.
_WANTED = """
with claimed as materialized (
    select c.*, b.base_date, (select issued_at from corrections where seq = c.reset_seq) as issued_at
    from unnest($1::text[], $2::text[], $3::date[], $4::int[], $6::bigint[])
        as c (security_id, portfolio_id, watermark_date, epoch, reset_seq)
    join (  -- once per date: thousands of keys have few
        select watermark_date, (select max(business_date) from business_dates where business_date <= d.watermark_date)
            as base_date
        from unnest($3::date[]) as d (watermark_date) group by watermark_date
    ) as b using (watermark_date)
), quotes as materialized (
    select span.security_id, d.business_date, q.price, q.price_date
    from (select security_id, min(watermark_date) as watermark_date from claimed group by security_id) as span
    join business_dates d on d.business_date > span.watermark_date and d.business_date <= $5
    left join lateral (
        select price, price_date from market_prices p
        where p.security_id = span.security_id and p.price_date <= d.business_date
        order by p.price_date desc limit 1
    ) as q on true
), ranges as (
    select c.security_id, c.portfolio_id, c.epoch, c.watermark_date, c.base_date, c.reset_seq, c.issued_at,
           h.quantity, h.cost_basis, h.position_date as from_date,
           lead(h.position_date) over (partition by c.security_id, c.portfolio_id order by h.sequence) as to_date
    from (
        select c.*, coalesce((
            select max(b.position_date) from position_history b
            where b.security_id = c.security_id and b.portfolio_id = c.portfolio_id and b.superseded_epoch is null
              and b.position_date <= c.base_date), '-infinity') as held_from
        from claimed c
        offset 0  -- once per key, not per row of its history
    ) as c
    cross join lateral (
        select h.position_date, h.sequence, h.quantity, h.cost_basis from position_history h
        where h.security_id = c.security_id and h.portfolio_id = c.portfolio_id and h.superseded_epoch is null
          and h.position_date >= c.held_from
        offset 0  -- key by key by index: a hash join would read the whole table
    ) as h
), days as (
    select r.security_id, r.portfolio_id, r.epoch, r.watermark_date, d.business_date, r.quantity, r.cost_basis,
           r.reset_seq, d.closed_at > r.issued_at as is_later,
           lag(r.quantity, 1, 0) over (partition by r.security_id, r.portfolio_id order by d.business_date) as previous
    from ranges r
    join business_dates d on d.business_date >= r.from_date and (r.to_date is null or d.business_date < r.to_date)
        and (r.base_date is null or d.business_date >= r.base_date) and d.business_date <= $5
), wanted as (
    select security_id, portfolio_id, business_date as valuation_date, epoch, quantity, cost_basis, price, price_date,
           case when quantity = 0 then 0 else value end as market_value,
           case when quantity = 0 then 0 else value - cost_basis end as unrealized_gain_loss,
           case when price is null then 'UNVALUED' when price_date = business_date then 'VALUED_CURRENT'
                else 'VALUED_STALE' end as valuation_status,
           reset_seq, is_later
    from (
        select days.*, q.price, q.price_date, round_half_even(days.quantity * q.price, 10) as value
        from (
            select * from days where business_date > watermark_date and (quantity <> 0 or previous <> 0) offset 0
        ) as days
        full join quotes q using (security_id, business_date)
        where coalesce(days.watermark_date, 'infinity') < 'infinity'
        offset 0  -- a fence: the rounding is evaluated once
    ) as valued
"""

# `seq` is the correction that a snapshot changes for. It is null where the books had said nothing yet: the date was
# closed after the correction was issued.
_REVALUE = f"""{_WANTED}
), found as (
    select s.*, c.reset_seq from claimed c
    cross join lateral (
        select s.ctid as place, s.* from daily_position_snapshots s
        where s.security_id = c.security_id and s.portfolio_id = c.portfolio_id and s.valuation_date > c.watermark_date
        offset 0  -- likewise
    ) as s
), difference as materialized (
    select f.place, coalesce(w.security_id, f.security_id) as security_id,
           coalesce(w.portfolio_id, f.portfolio_id) as portfolio_id,
           coalesce(w.valuation_date, f.valuation_date) as valuation_date, w.valuation_date is null as excess,
           w.epoch, w.quantity, w.cost_basis, w.price, w.price_date, w.market_value, w.unrealized_gain_loss,
           w.valuation_status, f.market_value as value_before,
           case when f.place is not null or not w.is_later then coalesce(w.reset_seq, f.reset_seq) end as seq
    from wanted w
    full join found f using (security_id, portfolio_id, valuation_date)
    where (w.quantity, w.cost_basis, w.price, w.price_date, w.market_value, w.unrealized_gain_loss, w.valuation_status)
        is distinct from
        (f.quantity, f.cost_basis, f.price, f.price_date, f.market_value, f.unrealized_gain_loss, f.valuation_status)
), changed as (
    -- By place: the key's lock keeps every other writer of its snapshots out.
    update daily_position_snapshots s set
        epoch = d.epoch, quantity = d.quantity, cost_basis = d.cost_basis, price = d.price, price_date = d.price_date,
        market_value = d.market_value, unrealized_gain_loss = d.unrealized_gain_loss,
        valuation_status = d.valuation_status
    from difference d
    where s.ctid = d.place and not d.excess
      and s.ctid = any (array(select place from difference where place is not null and not excess))
), removed as (
    delete from daily_position_snapshots s using difference d
    where s.ctid = d.place and d.excess and s.ctid = any (array(select place from difference where excess))
), added as (
    insert into daily_position_snapshots (security_id, portfolio_id, valuation_date, epoch, quantity, cost_basis, price,
                                          price_date, market_value, unrealized_gain_loss, valuation_status)
    select security_id, portfolio_id, valuation_date, epoch, quantity, cost_basis, price, price_date, market_value,
           unrealized_gain_loss, valuation_status
    from difference where place is null
), per_key as (
    select security_id, portfolio_id, min(valuation_date) as from_date, count(*) as changed, max(seq) as seq,
           count(seq) as corrected, min(valuation_date) filter (where seq is not null) as corrected_from,
           max(valuation_date) filter (where seq is not null) as corrected_to,
           sum(abs(coalesce(market_value, 0) - coalesce(value_before, 0))) filter (where seq is not null) as total
    from difference group by security_id, portfolio_id
), summed as (
    insert into correction_changes (seq, snapshots, absolute_change, from_date, to_date)
    select seq, sum(corrected), sum(total), min(corrected_from), max(corrected_to)
    from per_key where seq is not null group by seq
), largest as (
    select * from (
        select *, row_number() over (partition by seq order by total desc, portfolio_id) as place
        from per_key where seq is not null
    ) as ranked
    where place <= {corrections.VALUES_KEPT}
), kept as (
    insert into correction_values as v
        (seq, security_id, portfolio_id, valuation_date, quantity, market_value_before, market_value_after)
    select l.seq, l.security_id, l.portfolio_id, l.corrected_from, coalesce(d.quantity, 0), d.value_before,
           d.market_value
    from largest l
    full join difference d on d.security_id = l.security_id and d.portfolio_id = l.portfolio_id
        and d.valuation_date = l.corrected_from
    where coalesce(l.seq, 0) > 0
    on conflict (seq, security_id, portfolio_id) do update set
        quantity = excluded.quantity, market_value_after = excluded.market_value_after
        where v.valuation_date = excluded.valuation_date
), published as (
    insert into outbox_events (topic, message_key, value)
    select 'position-valuations', position_key(k.portfolio_id, k.security_id),
           convert_to(jsonb_build_object(
               'portfolio_id', k.portfolio_id, 'security_id', k.security_id, 'epoch', c.epoch,
               'from_date', k.from_date, 'to_date', $5::date, 'changed', k.changed,
               'quantity', trim_scale(coalesce(w.quantity, 0)), 'cost_basis', trim_scale(coalesce(w.cost_basis, 0)),
               'price', trim_scale(w.price), 'market_value', trim_scale(w.market_value),
               'unrealized_gain_loss', trim_scale(w.unrealized_gain_loss))::text, 'UTF8')
    from per_key k
    full join claimed c using (security_id, portfolio_id)
    full join (select * from wanted where valuation_date = $5) as w using (security_id, portfolio_id)
    where coalesce(k.changed, 0) > 0
)
select coalesce(sum(changed), 0)::bigint from per_key
"""

_ADVANCE = """
update position_state s set watermark_date = $3, status = 'CURRENT', reset_seq = null
from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
where s.security_id = key.security_id and s.portfolio_id = key.portfolio_id
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass did: keys valued, snapshots written (inserted, changed or removed), closed keys moved on.

    securities: not due any more; right: the corrections that are right now.
    """

    keys: int = 0
    snapshots: int = 0
    closed: int = 0
    securities: int = 0
    right: Sequence[corrections.Right] = ()


class Valuation:
    """The loop; what it keeps between two passes is where to claim next."""

    def __init__(self, pool: Pool, keys: int) -> None:
        self.claims = Claims(keys)
        self._pool = pool
        self._swept = 0.0
        self._swept_to = ""

    async def pass_once(self) -> Pass:
        """Value up to `keys` dirty keys in one transaction; then, in another, tell what became right."""
        async with self._pool.acquire() as connection:
            latest = await calendar.latest_closed(connection)
            self.claims.begin()
            async with connection.transaction():
                await connection.execute(PLAN_FOR_THESE)
                done, passed = Pass(), list[str]()
                if latest is not None:
                    done, passed = await self._value_due(connection, latest)
                if done == Pass() or time.monotonic() - self._swept > _SWEEP_SECONDS:
                    self._swept = time.monotonic()
                    passed += await self._sweep(connection)
            raised, right = await settling.settle(connection, passed, latest)
        return replace(done, securities=raised, right=tuple(right))

    async def _sweep(self, connection: Connection) -> list[str]:
        """Securities with corrections that may be right without having been passed here, in turn."""
        found = await corrections.unsettled(connection, self._swept_to, SECURITIES_AT_ONCE)
        self._swept_to = found[-1] if len(found) == SECURITIES_AT_ONCE else ""
        return found

    async def _value_due(self, connection: Connection, latest: date) -> tuple[Pass, list[str]]:
        done, passed = await self._value_queued(connection, latest)
        if done == Pass():  # nothing is queued, or others have done it
            await self.claims.look_up(connection, latest)
            done, more = await self._value_queued(connection, latest)
            passed += more
        return done, passed

    async def _value_queued(self, connection: Connection, latest: date) -> tuple[Pass, list[str]]:
        """What was done, and the securities gone through to their end; when nothing was, the queues are empty now."""
        passed: list[str] = []
        while page := self.claims.next_page():
            claimed = await self.claims.claim(connection, page, latest)
            done = await _value(connection, claimed, latest) if claimed else Pass()
            passed += self.claims.passed(page, claimed)
            if done != Pass():
                return done, passed
        return Pass(), passed


async def _value(connection: Connection, claimed: Sequence[Mapping[str, Any]], latest: date) -> Pass:
    """Value those of the claimed keys that are due up to `latest`, and move the watermarks of all on.

    The caller holds their rows.
    """
    due = [row for row in claimed if row["due"]]
    snapshots = await _revalue(connection, due, latest) if due else 0
    keys = [row["security_id"] for row in claimed], [row["portfolio_id"] for row in claimed]
    await connection.execute(BY_INDEX)  # a merge join would begin at the security's first key, each time
    await connection.execute(_ADVANCE, *keys, latest)
    return Pass(len(due), snapshots, len(claimed) - len(due))


async def _revalue(connection: Connection, due: Sequence[Mapping[str, Any]], latest: date) -> int:
    names = ("security_id", "portfolio_id", "watermark_date", "epoch")
    columns = [[row[name] for row in due] for name in names]
    written: int = await connection.fetchval(_REVALUE, *columns, latest, [row["reset_seq"] for row in due])
    return written
