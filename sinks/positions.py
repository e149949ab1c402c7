"""The position sink: transactions, history, epoch, watermark and replay in one transaction (design, Position sink)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date

from sinks import booking, calendar, corrections, costing, transactions
from sinks.booking import Booking, Key, KeyState, Tail, Touch
from sinks.database import Connection
from sinks.model import CostBasisMethod, Transaction

_CREATE_KEYS = """
insert into position_state (security_id, portfolio_id, watermark_date)
select * from unnest($1::text[], $2::text[], $3::date[])
on conflict do nothing
returning security_id, portfolio_id
"""

_LOCK_KEYS = """
select from position_state
join unnest($1::text[], $2::text[]) as key (security_id, portfolio_id) using (security_id, portfolio_id)
order by security_id, portfolio_id
for no key update of position_state
"""

_READ_KEYS = """
select security_id, portfolio_id, epoch, watermark_date, sequence, transaction_date, transaction_id,
       realized_gain_loss, lots
from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
join position_state using (security_id, portfolio_id)
left join cost_states using (security_id, portfolio_id)
"""

_SUPERSEDE = """
update position_history h set superseded_at = clock_timestamp(), superseded_epoch = new.epoch
from unnest($1::text[], $2::text[], $3::int[], $4::int[]) as new (security_id, portfolio_id, epoch, kept)
where h.security_id = new.security_id and h.portfolio_id = new.portfolio_id
  and h.superseded_epoch is null and h.sequence > new.kept
"""

_WRITE_HISTORY = """
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, position_date,
                              quantity, cost_basis, realized_gain_loss)
select * from unnest($1::text[], $2::text[], $3::int[], $4::int[], $5::text[], $6::date[],
                     $7::numeric[], $8::numeric[], $9::numeric[])
"""

_KEEP_TAILS = """
insert into cost_states as stored (security_id, portfolio_id, sequence, transaction_date, transaction_id,
                                   realized_gain_loss, lots)
select * from unnest($1::text[], $2::text[], $3::int[], $4::timestamptz[], $5::text[], $6::text[], $7::text[])
on conflict (security_id, portfolio_id) do update set
    sequence = excluded.sequence, transaction_date = excluded.transaction_date,
    transaction_id = excluded.transaction_id, realized_gain_loss = excluded.realized_gain_loss, lots = excluded.lots
"""

_DROP_TAILS = """
delete from cost_states using unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
where cost_states.security_id = key.security_id and cost_states.portfolio_id = key.portfolio_id
"""

# A marker has no transaction: sequence 0 and the count of what follows.
_PUBLISH = """
insert into outbox_events (topic, message_key, value)
select 'transactions-processed', convert_to(event.portfolio_id || '|' || event.security_id, 'UTF8'), convert_to((
    jsonb_build_object('portfolio_id', event.portfolio_id, 'security_id', event.security_id,
                       'epoch', event.epoch, 'sequence', event.sequence)
    || case when t.transaction_id is null then jsonb_build_object('count', event.count) else jsonb_build_object(
        'transaction_id', t.transaction_id,
        'transaction_date', to_char(t.transaction_date at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'transaction_type', t.transaction_type, 'quantity', trim_scale(t.quantity), 'price', trim_scale(t.price),
        'gross_transaction_amount', trim_scale(t.gross_transaction_amount), 'trade_fee', trim_scale(t.trade_fee),
        'currency', t.currency, 'revision', t.revision, 'cancelled', t.cancelled, 'replayed', event.replayed) end
    )::text, 'UTF8')
from unnest($1::text[], $2::text[], $3::int[], $4::int[], $5::text[], $6::boolean[], $7::int[]) with ordinality
    as event (security_id, portfolio_id, epoch, sequence, transaction_id, replayed, count, place)
left join transactions t on t.transaction_id = event.transaction_id
order by place
"""

# A rebuild of nothing but the future leaves no closed date to value again.
_MOVE_KEYS = """
update position_state s set
    epoch = new.epoch,
    watermark_date = new.watermark_date,
    status = case when dirty then 'REPROCESSING' else status end,
    reset_seq = case when dirty then least(reset_seq, new.seq) else reset_seq end
from (
    select *, seq is not null and watermark_date < $6::date as dirty
    from unnest($1::text[], $2::text[], $3::int[], $4::date[], $5::bigint[])
        as moved (security_id, portfolio_id, epoch, watermark_date, seq)
) as new
where s.security_id = new.security_id and s.portfolio_id = new.portfolio_id
"""

# Not filtered on valued_through: a filter would look at the row as it was before the lock.
_LOWER = """
update securities s set valued_through = least(s.valued_through, new.day)
from unnest($1::text[], $2::date[]) as new (security_id, day)
where s.security_id = new.security_id
"""


@dataclass(slots=True)
class PositionOutcome:
    """Records ignored and in conflict; transactions appended; keys rebuilt, and transactions replayed for them."""

    ignored: int
    conflicts: dict[int, str] = field(default_factory=dict)
    appended: int = 0
    rebuilt: int = 0
    replayed: int = 0


async def apply(
    connection: Connection, numbered: Sequence[tuple[int, Transaction]], method: CostBasisMethod
) -> PositionOutcome:
    """Book the batch. Each key is appended to, or rebuilt once under a new epoch.

    Holds the calendar still: closing a date before L issues corrections for the keys there are, and must not miss one
    that is being made.
    """
    await calendar.lock_shared(connection)
    stored = await transactions.store(connection, numbered)
    outcome = PositionOutcome(stored.ignored, stored.conflicts)
    for booked in await book(connection, booking.touches(stored.changes), method):
        if booked.rebuilt_from is None:
            outcome.appended += len(booked.entries)
        else:
            outcome.rebuilt += 1
            outcome.replayed += len(booked.live)
    return outcome


async def book(connection: Connection, touches: dict[Key, Touch], method: CostBasisMethod) -> list[Booking]:
    """Write what the touches make of their keys, which come in lock order: history, epoch, watermark, outbox."""
    if not touches:
        return []
    before = await _lock(connection, touches)
    bookings = await _book(connection, touches, before, method)
    await _write_history(connection, bookings)
    await _publish(connection, bookings)
    await _move(connection, bookings, before)
    return bookings


async def _lock(connection: Connection, touches: dict[Key, Touch]) -> dict[Key, KeyState]:
    """Create what is missing, lock all in order, and read in a statement of its own what the wait has brought."""
    first = {key: touch.arrivals[0].position_date for key, touch in touches.items() if touch.arrivals}
    watermarks = [booking.day_before(day) for day in first.values()]
    created = {tuple(row) for row in await connection.fetch(_CREATE_KEYS, *_ids(first), watermarks)}
    await connection.execute(_LOCK_KEYS, *_ids(touches))
    rows = {
        (row["security_id"], row["portfolio_id"]): row for row in await connection.fetch(_READ_KEYS, *_ids(touches))
    }
    return {
        key: KeyState(
            row["epoch"],
            row["watermark_date"],
            None
            if row["sequence"] is None
            else Tail(
                row["sequence"],
                (row["transaction_date"], row["transaction_id"].encode()),
                costing.decode(row["lots"], row["realized_gain_loss"]),
            ),
            key in created,
        )
        for key, row in rows.items()
    }


async def _book(
    connection: Connection, touches: dict[Key, Touch], before: dict[Key, KeyState], method: CostBasisMethod
) -> list[Booking]:
    late = [key for key, touch in touches.items() if booking.needs_rebuild(before[key], touch)]
    live = await transactions.read_live(connection, late) if late else {}
    return [
        booking.rebuild(key, before[key], touch, live[key], method)
        if key in live
        else booking.append(key, before[key], touch, method)
        for key, touch in touches.items()
    ]


async def _write_history(connection: Connection, bookings: Sequence[Booking]) -> None:
    rebuilt = [booked for booked in bookings if booked.rebuilt_from]
    if rebuilt:
        keys = _ids(booked.key for booked in rebuilt)
        await connection.execute(_SUPERSEDE, *keys, [b.epoch for b in rebuilt], [b.kept for b in rebuilt])
    rows = [
        (
            *booked.key,
            booked.epoch,
            entry.sequence,
            entry.transaction.transaction_id,
            entry.transaction.position_date,
            costing.rounded(entry.state.quantity),
            costing.rounded(entry.state.cost_basis),
            costing.rounded(entry.state.realized),
        )
        for booked in bookings
        for entry in booked.entries
    ]
    if rows:
        await connection.execute(_WRITE_HISTORY, *_columns(rows))
    await _keep_tails(connection, bookings)


async def _keep_tails(connection: Connection, bookings: Sequence[Booking]) -> None:
    """The last state of each key, so that an append reads no history."""
    rows = [
        (
            *booked.key,
            tail.sequence,
            tail.transaction.transaction_date,
            tail.transaction.transaction_id,
            str(tail.state.realized),
            costing.encode_lots(tail.state),
        )
        for booked in bookings
        if (tail := booked.tail)
    ]
    if rows:
        await connection.execute(_KEEP_TAILS, *_columns(rows))
    if emptied := [booked.key for booked in bookings if booked.tail is None]:
        await connection.execute(_DROP_TAILS, *_ids(emptied))


async def _publish(connection: Connection, bookings: Sequence[Booking]) -> None:
    """Appends as they are; after a rebuild a marker and the whole live history, for consumers to start again."""
    events: list[tuple[str, str, int, int, str | None, bool, int]] = []
    for booked in bookings:
        if booked.rebuilt_from is None:
            events += [
                (*booked.key, booked.epoch, e.sequence, e.transaction.transaction_id, False, 0) for e in booked.entries
            ]
            continue
        events.append((*booked.key, booked.epoch, 0, None, True, len(booked.live)))
        events += [
            (*booked.key, booked.epoch, sequence, t.transaction_id, True, 0)
            for sequence, t in enumerate(booked.live, 1)
        ]
    await connection.execute(_PUBLISH, *_columns(events))


async def _move(connection: Connection, bookings: Sequence[Booking], before: dict[Key, KeyState]) -> None:
    """Epochs and watermarks; the securities of keys that became due are told last, as the lock order demands."""
    lowered: dict[str, date] = {}
    rebuilt: dict[str, date] = {}
    for booked in bookings:
        security = booked.key[0]
        stored = before[booked.key]
        if stored.is_new or booked.watermark < stored.watermark:
            lowered[security] = min(lowered.get(security, booked.watermark), booked.watermark)
        if booked.rebuilt_from:
            rebuilt[security] = min(rebuilt.get(security, booked.rebuilt_from), booked.rebuilt_from)
    await corrections.lock_securities(connection, [*lowered, *rebuilt])
    seqs = await corrections.record(connection, list(rebuilt.items()), "transaction")
    latest = await calendar.latest_closed(connection)
    moved = [b for b in bookings if b.rebuilt_from or b.watermark != before[b.key].watermark]
    if moved:
        rows = [(*b.key, b.epoch, b.watermark, seqs[b.key[0]] if b.rebuilt_from else None) for b in moved]
        await connection.execute(_MOVE_KEYS, *_columns(rows), latest)
    if lowered:
        await connection.execute(_LOWER, list(lowered), list(lowered.values()))


def _ids(keys: Iterable[Key]) -> tuple[list[str], list[str]]:
    pairs = list(keys)
    return [security for security, _ in pairs], [portfolio for _, portfolio in pairs]


def _columns(rows: Sequence[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
