"""A new generation: commits were lost that had been published, so what consumers may have seen ahead is announced anew.

Numbers go on above everything that was published. Every position that may have been seen ahead gets a higher epoch,
with a marker and a replay, and a valuation from the earliest date that was announced. A position that was lost entirely
is announced as empty. Claims of before are fenced out. All of it commits with the gate's opening, or nothing does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from typing import Any

from sinks import replay, statuses
from sinks.database import Connection
from sinks.generation import Installation, Mark
from sinks.history import columns

EPOCHS_BITS, _MOST = 20, 2_047
"""Epochs of a generation begin at the generation, shifted by so many bits; those beyond _MOST just go on."""
_CLAIMS_BITS = 20
_KEYS_AT_ONCE = 20_000

_BEGIN = """
update installation set
    instance = this_instance(), fence = greatest(fence + 1, $1), generation = $2,
    first_epoch = case when $3 then $4 else first_epoch end
returning fence
"""

_PLACE = "update relay_positions set positions = $1::jsonb"

_MOVE = "select setval($1::regclass, greatest($2::bigint, (select last_value from {sequence})))"

# Above what any claim of the lost future had: fences are offsets of one log, and grow. No claim has failed for it.
_FENCE_CLAIMS = "update kafka_offsets set epoch = greatest(epoch + 1, $1::bigint << $2), released = true"

# Not due: there is nothing to value until the position's transactions are read again.
_ENSURE_KEYS = """
with lost as (
    insert into position_state (security_id, portfolio_id, watermark_date)
    select security_id, portfolio_id, coalesce((select max(business_date) from business_dates), date '1900-01-01')
    from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
    order by security_id collate "C", portfolio_id collate "C"
    on conflict do nothing
    returning security_id
)
insert into securities (security_id) select distinct security_id from lost on conflict do nothing
"""

_RAISE_EPOCHS = """
with raised as (
    update position_state s set epoch = greatest(s.epoch, seen.epoch, $4::int - 1) + 1
    from unnest($1::text[], $2::text[], $3::int[]) as seen (security_id, portfolio_id, epoch)
    where s.security_id = seen.security_id and s.portfolio_id = seen.portfolio_id
    returning s.security_id, s.portfolio_id, s.epoch
)
select r.security_id, r.portfolio_id, r.epoch, (
    select count(*)::int from position_history h
    where h.security_id = r.security_id and h.portfolio_id = r.portfolio_id and h.superseded_epoch is null) as count
from raised r
order by r.security_id collate "C", r.portfolio_id collate "C"
"""

# As the snapshots say now. Whatever is still to be valued is announced when it changes them.
_VALUATIONS = """
insert into outbox_events (topic, message_key, value)
select 'position-valuations', position_key(k.portfolio_id, k.security_id),
       convert_to(jsonb_build_object(
           'portfolio_id', k.portfolio_id, 'security_id', k.security_id, 'epoch', s.epoch,
           'from_date', least(k.from_date, l.day), 'to_date', l.day, 'changed', (
               select count(*) from daily_position_snapshots v
               where v.security_id = k.security_id and v.portfolio_id = k.portfolio_id
                 and v.valuation_date >= k.from_date),
           'quantity', trim_scale(coalesce(v.quantity, 0)), 'cost_basis', trim_scale(coalesce(v.cost_basis, 0)),
           'price', trim_scale(v.price), 'market_value', trim_scale(v.market_value),
           'unrealized_gain_loss', trim_scale(v.unrealized_gain_loss))::text, 'UTF8')
from unnest($1::text[], $2::text[], $3::date[]) as k (security_id, portfolio_id, from_date)
join position_state s using (security_id, portfolio_id)
cross join (select coalesce(max(business_date), $4) as day from business_dates) as l
left join daily_position_snapshots v on v.security_id = k.security_id and v.portfolio_id = k.portfolio_id
    and v.valuation_date = l.day
order by k.security_id collate "C", k.portfolio_id collate "C"
"""

# Not of what the books say as well, nor of jobs that nobody has: those were announced as void.
_STATUSES = statuses.announce(
    """
from unnest($1::text[], $2::bigint[], $3::text[]) as announced (security_id, job_id, last)
where last is distinct from coalesce(
    (select case when c.right_at is not null then 'BOOKS_RIGHT'
                 else (select j.status from reprocessing_jobs j where j.job_id = c.seq) end
     from corrections c where c.seq = announced.job_id and c.security_id = announced.security_id),
    case when last in ('CANCELLED', 'BOOKS_REOPENED') then last end)
""",
    of_no_job=("BOOKS_REOPENED", "the database lost what was announced of it"),
)

_EVERY_KEY = """
select s.security_id, s.portfolio_id, s.epoch, coalesce((
    select min(v.valuation_date) from daily_position_snapshots v
    where v.security_id = s.security_id and v.portfolio_id = s.portfolio_id), s.watermark_date) as from_date
from position_state s
"""

_WRITE_DOWN = """
insert into generations (generation, fence, round, lost_round, keys, jobs) values ($1, $2, $3, $4, $5, $6)
"""


@dataclass(slots=True)
class Seen:
    """What consumers may have seen of a position: the highest epoch, and the earliest date of its valuations."""

    epoch: int = 0
    from_date: date | None = None

    def add(self, epoch: int, from_date: date | None = None) -> None:
        """One message more."""
        self.epoch = max(self.epoch, epoch)
        if from_date is not None:
            self.from_date = from_date if self.from_date is None else min(self.from_date, from_date)


@dataclass(slots=True)
class Published:
    """What was published from a place on. keys: by (security_id, portfolio_id); statuses: by (security_id, job_id).

    positions: where each output partition ended. reaches_back: whether the log still held everything from the place on.
    """

    keys: dict[tuple[str, str], Seen] = field(default_factory=dict)
    statuses: dict[tuple[str, int], str] = field(default_factory=dict)
    positions: Mapping[str, int] = field(default_factory=dict)
    reaches_back: bool = True


async def begin(connection: Connection, before: Installation, fence: int, lost: Mark, published: Published) -> int:
    """Open the gate under a new generation; returns its number. One transaction."""
    generation = max(before.generation, lost.generation) + 1
    first = min(generation, _MOST) << EPOCHS_BITS
    async with connection.transaction():
        everything = not published.reaches_back
        number: int = await connection.fetchval(_BEGIN, fence, generation, everything, first)
        await connection.execute(_PLACE, json.dumps(published.positions))
        await _move_numbers(connection, lost)
        await connection.execute(_FENCE_CLAIMS, number, _CLAIMS_BITS)
        if everything:
            for row in await connection.fetch(_EVERY_KEY):
                seen = published.keys.setdefault((row["security_id"], row["portfolio_id"]), Seen())
                seen.add(row["epoch"], row["from_date"])
        keys = iter(published.keys.items())
        while some := list(islice(keys, _KEYS_AT_ONCE)):
            await _announce(connection, some, first)
        if published.statuses:
            jobs = [(*job, status) for job, status in published.statuses.items()]
            await connection.execute(_STATUSES, *columns(jobs))
        await connection.execute(
            _WRITE_DOWN, generation, number, before.round, lost.round, len(published.keys), len(published.statuses)
        )
    return generation


async def _move_numbers(connection: Connection, lost: Mark) -> None:
    """Go on above everything that was published."""
    outbox: str = await connection.fetchval("select pg_get_serial_sequence('outbox_events', 'id')")
    await connection.execute(_MOVE.format(sequence=outbox), outbox, lost.event_id)
    await connection.execute(_MOVE.format(sequence="correction_seq"), "correction_seq", lost.seq)


async def _announce(connection: Connection, some: Sequence[tuple[tuple[str, str], Seen]], first_epoch: int) -> None:
    securities, portfolios, epochs = columns([(*key, seen.epoch) for key, seen in some])
    await connection.execute(_ENSURE_KEYS, securities, portfolios)
    raised: list[Any] = await connection.fetch(_RAISE_EPOCHS, securities, portfolios, epochs, first_epoch)
    await replay.announce(connection, [tuple(row) for row in raised], replay.ROWS)
    valued = [(*key, seen.from_date) for key, seen in some if seen.from_date is not None]
    if valued:
        await connection.execute(_VALUATIONS, *columns(valued), max(day for *_, day in valued))
