"""What the position sink tells downstream: appends as they are; after a rebuild a marker and the whole live history.

Small replays are queued row by row. A large one is queued as one row, which the relay expands in place from the history
(`expand`), before later messages of the key, and abandons when a newer epoch exists. Its event ids are drawn with it,
so they lie where the key's ids must.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sinks.booking import Booked, Booking
from sinks.database import Connection
from sinks.history import columns

ROWS = 10_000
"""Replayed transactions that one database transaction queues row by row, unless it is told otherwise."""

_APPENDED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', position_key(e.portfolio_id, e.security_id),
       processed_transaction(t, e.epoch, e.sequence, false)
from unnest($1::text[], $2::text[], $3::int[], $4::int[], $5::text[]) with ordinality
    as e (security_id, portfolio_id, epoch, sequence, transaction_id, place)
join transactions t using (transaction_id)
order by place
"""

_MARKED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', position_key(m.portfolio_id, m.security_id),
       convert_to(json_build_object('portfolio_id', m.portfolio_id, 'security_id', m.security_id, 'epoch', m.epoch,
                                    'sequence', 0, 'count', m.count)::text, 'UTF8')
from unnest($1::text[], $2::text[], $3::int[], $4::int[]) with ordinality
    as m (security_id, portfolio_id, epoch, count, place)
order by place
"""

_REPLAYED = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', position_key(r.portfolio_id, r.security_id),
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
select 'transactions-processed', position_key(r.portfolio_id, r.security_id),
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

# One row for each replay, whatever its piece holds; without values when its epoch is over.
_PIECES = """
select o.id as row, piece.sequences, piece.values,
       replayed_ids(o.replay -> 'event_ids', (o.replay ->> 'next')::int, wanted.upto) as ids
from unnest($1::bigint[], $2::int[]) as wanted (row, upto)
join outbox_events o on o.id = wanted.row
cross join lateral (
    select array_agg(m.sequence order by m.sequence) as sequences, array_agg(m.value order by m.sequence) as values
    from (
        select h.sequence, processed_transaction(t, s.epoch, h.sequence, true) as value
        from position_state s
        join position_history h on h.security_id = s.security_id and h.portfolio_id = s.portfolio_id
            and h.superseded_epoch is null
        join transactions t using (transaction_id)
        where s.security_id = o.replay ->> 'security_id' and s.portfolio_id = o.replay ->> 'portfolio_id'
          and s.epoch = (o.replay ->> 'epoch')::int
          and h.sequence between (o.replay ->> 'next')::int and wanted.upto
    ) as m
) as piece
"""


class Replay(msgspec.Struct, frozen=True):
    """A replay that waits to be expanded: sequences `next` to `last` of the key's history under the epoch.

    row: the outbox's row that stands for it.
    """

    row: int
    security_id: str
    portfolio_id: str
    epoch: int
    next: int
    last: int

    @property
    def left(self) -> int:
        """Messages still to be published."""
        return self.last - self.next + 1


async def appended(connection: Connection, bookings: Sequence[Booking]) -> None:
    """Queue the transactions that the bookings append, as they are."""
    entries = [
        (*booking.plan.key, booking.plan.epoch, entry.sequence, entry.transaction.transaction_id)
        for booking in bookings
        if booking.plan.rebuilt_from is None
        for entry in booking.entries
    ]
    if entries:
        await connection.execute(_APPENDED, *columns(entries))


async def rebuilt(connection: Connection, keys: Sequence[Booked], rows: int) -> None:
    """Queue a marker for each key that was rebuilt, and its live history; at most `rows` transactions one by one."""
    new = [(*booked.plan.key, booked.plan.epoch, booked.live_count) for booked in keys if booked.plan.rebuilt_from]
    if new:
        await announce(connection, new, rows)


async def announce(connection: Connection, new: Sequence[tuple[str, str, int, int]], rows: int) -> None:
    """The same for (security_id, portfolio_id, epoch, rows of live history)."""
    await connection.execute(_MARKED, *columns(new))
    at_once: list[tuple[str, str, int]] = []
    later: list[tuple[str, str, int, int]] = []
    for security, portfolio, epoch, count in sorted(new, key=lambda key: key[3]):  # the small ones first
        rows -= count
        if rows >= 0:
            at_once.append((security, portfolio, epoch))
        else:
            later.append((security, portfolio, epoch, count))
    if at_once:
        await connection.execute(_REPLAYED, *columns(at_once))
    if later:
        await connection.execute(_DEFERRED, *columns(later))


def shares(waiting: Sequence[Replay], messages: int) -> list[tuple[Replay, int]]:
    """How many messages each replay may expand to now: together at most `messages`.

    The shortest first: what they leave of an equal share is the others'. A replay that gets none waits.
    """
    found: list[tuple[Replay, int]] = []
    for place, replay in enumerate(sorted(waiting, key=lambda replay: replay.left)):
        count = min(replay.left, messages // (len(waiting) - place))
        messages -= count
        if count:
            found.append((replay, count))
    return found


async def expand(
    connection: Connection, waiting: Sequence[Replay], messages: int
) -> dict[int, list[tuple[int, int, bytes]] | None]:
    """The next messages of the replays, at most `messages` in all, by row: (event id, sequence, value).

    None: a newer epoch exists. A replay that is left out waits for the others.
    """
    wanted = {each.row: (each, count) for each, count in shares(waiting, messages)}
    upto = [(row, each.next + count - 1) for row, (each, count) in wanted.items()]
    found: dict[int, list[tuple[int, int, bytes]] | None] = {}
    for piece in await connection.fetch(_PIECES, *columns(upto)) if upto else ():
        row, ids, first = piece["row"], piece["ids"], wanted[piece["row"]][0].next
        places = zip(piece["sequences"] or (), piece["values"] or (), strict=True)
        found[row] = [(ids[sequence - first], sequence, value) for sequence, value in places] or None
    return found
