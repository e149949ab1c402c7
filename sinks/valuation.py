"""The valuation: recompute the dirty dates of dirty keys, short transaction by short transaction (design, section 3).

The watermark is the only truth about what is to be done; nothing is in flight outside a transaction.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import asyncpg

from sinks import calendar, corrections, holders, settling
from sinks.database import Connection, Pool

_SECURITIES_AT_ONCE = 1_000
_LOOKED_UP = 10_000  # securities of a queue
_SWEEP_SECONDS = 1.0  # for corrections that left no key to value

KEPT_FOR = 10.0
"""How many times as long as looking it up took a crowd's queues are kept, if they last that long: looking up passes
over all that is due, and before each transaction it would take a herd of 50,000 securities half of its time."""

# Two queues: what corrections wait for, by priority, oldest first; and what a newly closed date or a new transaction
# made due, longest behind first. Corrections are looked up security by security, whatever the statistics say: these lag
# behind a herd, and any other way of joining costs a product.
_DUE = """
with due as materialized (
    select d.security_id, d.valued_through, open.seq, open.priority
    from (select security_id, valued_through from securities where valued_through < $1 offset 0) as d
    left join lateral (
        select min(c.seq) as seq,
               max(coalesce((select priority from reprocessing_jobs j where j.job_id = c.job_id), 0)) as priority
        from corrections c
        where c.security_id = d.security_id and c.right_at is null and not c.held
        having count(*) > 0
    ) as open on true
)
select array(select security_id from due where seq is not null order by priority desc, seq limit $2) as corrected,
       array(select security_id from due where seq is null order by valued_through, security_id limit $2) as behind
"""

# Page by page in the order asked for, from each security's cursor on. It never waits, so the order of locks is free.
_CLAIM = f"""
select claimed.*
from unnest($1::text[], $2::text[]) as page (security_id, cursor)
cross join lateral (
    select s.security_id, s.portfolio_id, s.watermark_date, s.epoch, s.reset_seq
    from position_state s
    where s.security_id = page.security_id and s.portfolio_id > page.cursor and {holders.due("s", "$3::date")}
    order by s.portfolio_id
    limit $4
    for no key update skip locked
) as claimed
limit $4
"""

# A plan for any claim is one for ten keys of one security; for two thousand of a thousand it is quadratic. Nor may a
# claim sort: each page of a giant would read all that is left of it. And nothing may read through a whole table. How
# many dates are dirty the planner cannot know: it takes a third of all, and would hash a few in files.
_PLAN_FOR_THESE = """
set local plan_cache_mode = force_custom_plan;
set local enable_bitmapscan = off;
set local enable_seqscan = off;
set local work_mem = '32MB'
"""

# A closed position has nothing to value: its watermark moves on in bulk, no history or price is read.
_MOVE_ON = f"""
with idle as (
    select s.security_id, s.portfolio_id
    from unnest($1::text[]) as page (security_id)
    cross join lateral (
        select security_id, portfolio_id from position_state s
        where s.security_id = page.security_id and s.watermark_date < $2::date and not {holders.due("s", "$2::date")}
        order by portfolio_id
        limit $3
        for no key update skip locked
    ) as s
    limit $3
)
update position_state s set watermark_date = $2, status = 'CURRENT', reset_seq = null
from idle where s.security_id = idle.security_id and s.portfolio_id = idle.portfolio_id
"""

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
    """The loop's state is only where claims ended: without it claiming is quadratic in a security's keys.

    And, of a crowd, the queues: else it would be quadratic in securities.
    """

    def __init__(self, pool: Pool, keys: int) -> None:
        self._pool = pool
        self._keys = keys
        self._cursors: dict[str, str] = {}
        self._queues: dict[str, list[str]] = {}
        self._kept_until = 0.0
        self._turns = deque(["corrected", "behind"])  # in turn, so that neither starves the other
        self._swept = 0.0
        self._swept_to = ""

    async def pass_once(self) -> Pass:
        """Value up to `keys` dirty keys in one transaction; then, in another, tell what became right."""
        async with self._pool.acquire() as connection:
            latest = await calendar.latest_closed(connection)
            self._turns.rotate()
            if time.monotonic() >= self._kept_until:
                self._queues.clear()
            async with connection.transaction():
                await connection.execute(_PLAN_FOR_THESE)
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
        found = await corrections.unsettled(connection, self._swept_to, _SECURITIES_AT_ONCE)
        self._swept_to = found[-1] if len(found) == _SECURITIES_AT_ONCE else ""
        return found

    async def _value_due(self, connection: Connection, latest: date) -> tuple[Pass, list[str]]:
        done, passed = await self._value_queued(connection, latest)
        if done == Pass():  # nothing is queued, or others have done it
            await self._look_up(connection, latest)
            done, more = await self._value_queued(connection, latest)
            passed += more
        return done, passed

    async def _look_up(self, connection: Connection, latest: date) -> None:
        started = time.monotonic()
        row = await connection.fetchrow(_DUE, latest, _LOOKED_UP)
        self._queues = {name: row[name] for name in self._turns}
        is_crowd = sum(map(len, self._queues.values())) > _SECURITIES_AT_ONCE
        now = time.monotonic()
        self._kept_until = now + KEPT_FOR * (now - started) if is_crowd else now

    async def _value_queued(self, connection: Connection, latest: date) -> tuple[Pass, list[str]]:
        """What was done, and the securities gone through to their end; when nothing was, the queues are empty now."""
        done = Pass()
        passed: list[str] = []
        for name in self._turns:
            queue = self._queues.get(name, [])
            while queue and done == Pass():
                done, gone = await self._value(connection, queue[:_SECURITIES_AT_ONCE], latest)
                del queue[: len(gone)]
                passed += gone
        return done, passed

    async def _value(self, connection: Connection, page: Sequence[str], latest: date) -> tuple[Pass, list[str]]:
        """The same of these securities; those gone through are the first of them."""
        claimed = await self._claim(connection, page, latest)
        snapshots = await _revalue(connection, claimed, latest)
        closed = 0
        if len(claimed) < self._keys:
            tag = await connection.execute(_MOVE_ON, page, latest, self._keys)
            closed = int(tag.split()[-1])
        return Pass(len(claimed), snapshots, closed), self._move_on(page, claimed) if closed < self._keys else []

    async def _claim(self, connection: Connection, page: Sequence[str], latest: date) -> list[asyncpg.Record]:
        cursors = [self._cursors.get(security, "") for security in page]
        claimed: list[asyncpg.Record] = await connection.fetch(_CLAIM, page, cursors, latest, self._keys)
        return claimed

    def _move_on(self, page: Sequence[str], claimed: Sequence[asyncpg.Record]) -> list[str]:
        """The securities gone through to their end; a full claim ends within one."""
        if len(claimed) < self._keys:
            passed = list(page)
        else:
            last = claimed[-1]["security_id"]
            self._cursors[last] = claimed[-1]["portfolio_id"]
            passed = list(page[: page.index(last)])
        for security in passed:
            self._cursors.pop(security, None)
        return passed


async def _revalue(connection: Connection, claimed: Sequence[asyncpg.Record], latest: date) -> int:
    if not claimed:
        return 0
    securities, portfolios = [row["security_id"] for row in claimed], [row["portfolio_id"] for row in claimed]
    watermarks, epochs = [row["watermark_date"] for row in claimed], [row["epoch"] for row in claimed]
    seqs = [row["reset_seq"] for row in claimed]
    written: int = await connection.fetchval(_REVALUE, securities, portfolios, watermarks, epochs, latest, seqs)
    await connection.execute(_ADVANCE, securities, portfolios, latest)
    return written
