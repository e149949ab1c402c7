"""What the position sink tells downstream: appends as they are; after a rebuild a marker and the whole live history.

Small replays are queued row by row. A large one is queued as one row, which the relay expands in place from the history
(`expand`), before later messages of the key, and abandons when a newer epoch exists. Its event ids are drawn with it,
so they lie where the key's ids must.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from sinks.booking import Booking
from sinks.database import Connection
from sinks.history import columns

ROWS = 10_000
"""Replayed transactions that one database transaction queues row by row, unless it is told otherwise."""

_APPENDED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', convert_to(e.portfolio_id || '|' || e.security_id, 'UTF8'),
       processed_transaction(t, e.epoch, e.sequence, false)
from unnest($1::text[], $2::text[], $3::int[], $4::int[], $5::text[]) with ordinality
    as e (security_id, portfolio_id, epoch, sequence, transaction_id, place)
join transactions t using (transaction_id)
order by place
"""

_MARKED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', convert_to(m.portfolio_id || '|' || m.security_id, 'UTF8'),
       convert_to(json_build_object('portfolio_id', m.portfolio_id, 'security_id', m.security_id, 'epoch', m.epoch,
                                    'sequence', 0, 'count', m.count)::text, 'UTF8')
from unnest($1::text[], $2::text[], $3::int[], $4::int[]) with ordinality
    as m (security_id, portfolio_id, epoch, count, place)
order by place
"""

_REPLAYED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', convert_to(r.portfolio_id || '|' || r.security_id, 'UTF8'),
       processed_transaction(t, r.epoch, h.sequence, true)
from unnest($1::text[], $2::text[], $3::int[]) with ordinality as r (security_id, portfolio_id, epoch, place)
join position_history h on h.security_id = r.security_id and h.portfolio_id = r.portfolio_id
    and h.superseded_epoch is null
join transactions t using (transaction_id)
order by place, h.sequence
"""

# The ids are drawn while the key is held: above all that the key has, below all that it will get.
_DEFERRED = """
insert into outbox_events (topic, message_key, replay)
select 'transactions-processed', convert_to(r.portfolio_id || '|' || r.security_id, 'UTF8'),
       jsonb_build_object('security_id', r.security_id, 'portfolio_id', r.portfolio_id, 'epoch', r.epoch,
                          'next', 1, 'last', r.count, 'event_ids', ids.blocks)
from unnest($1::text[], $2::text[], $3::int[], $4::int[]) with ordinality
    as r (security_id, portfolio_id, epoch, count, place)
cross join lateral (
    select jsonb_agg(jsonb_build_array(lower(block), upper(block) - lower(block)) order by block) as blocks
    from (
        select unnest(range_agg(int8range(id, id, '[]'))) as block
        from (select nextval('outbox_events_id_seq') as id from generate_series(1, r.count)) as drawn
    ) as merged
) as ids
order by place
"""

_PIECE = """
select h.sequence, processed_transaction(t, s.epoch, h.sequence, true) as value
from position_state s
join position_history h on h.security_id = s.security_id and h.portfolio_id = s.portfolio_id
    and h.superseded_epoch is null
join transactions t using (transaction_id)
where s.security_id = $1 and s.portfolio_id = $2 and s.epoch = $3 and h.sequence between $4 and $5
order by h.sequence
"""


class Replay(msgspec.Struct, frozen=True):
    """A replay that waits to be expanded: sequences `next` to `last` of the key's history under the epoch.

    event_ids: [first id, count] blocks for the sequences from 1 on.
    """

    security_id: str
    portfolio_id: str
    epoch: int
    next: int
    last: int
    event_ids: list[tuple[int, int]]

    def ids(self) -> Iterator[int]:
        """The event ids of the messages from `next` on."""
        skipped = self.next - 1
        for first, count in self.event_ids:
            yield from range(first + min(skipped, count), first + count)
            skipped = max(0, skipped - count)


async def publish(connection: Connection, bookings: Sequence[Booking], rows: int) -> None:
    """Queue what the bookings mean for downstream; at most `rows` replayed transactions one by one."""
    appended = [
        (*booked.plan.key, booked.plan.epoch, entry.sequence, entry.transaction.transaction_id)
        for booked in bookings
        if booked.plan.rebuilt_from is None
        for entry in booked.entries
    ]
    rebuilt = [
        (*booked.plan.key, booked.plan.epoch, booked.live_count) for booked in bookings if booked.plan.rebuilt_from
    ]
    if appended:
        await connection.execute(_APPENDED, *columns(appended))
    if not rebuilt:
        return
    await connection.execute(_MARKED, *columns(rebuilt))
    at_once: list[tuple[str, str, int]] = []
    later: list[tuple[str, str, int, int]] = []
    for security, portfolio, epoch, count in sorted(rebuilt, key=lambda key: key[3]):  # the small ones first
        rows -= count
        if rows >= 0:
            at_once.append((security, portfolio, epoch))
        else:
            later.append((security, portfolio, epoch, count))
    if at_once:
        await connection.execute(_REPLAYED, *columns(at_once))
    if later:
        await connection.execute(_DEFERRED, *columns(later))


async def expand(connection: Connection, waiting: Replay, limit: int) -> list[tuple[int, int, bytes]] | None:
    """The next messages of a replay, at most `limit`: (event id, sequence, value); None: a newer epoch exists."""
    end = min(waiting.last, waiting.next + limit - 1)
    rows = await connection.fetch(_PIECE, waiting.security_id, waiting.portfolio_id, waiting.epoch, waiting.next, end)
    if not rows:
        return None
    return [(id_, row["sequence"], row["value"]) for id_, row in zip(waiting.ids(), rows, strict=False)]
