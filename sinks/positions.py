"""The position sink: transactions, history, epoch, watermark and replay in one transaction (design, Position sink).

The number of statements does not depend on the number of transactions or keys in the batch, and what is read depends
on what changes, not on how long the keys' histories are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta

from sinks import booking, calendar, corrections, costing, history, holders, replay, transactions
from sinks.booking import Base, Booked, Booking, Key, KeyState, Plan, Touch
from sinks.database import Connection
from sinks.history import columns, key_columns
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

# Outdated histories are few: the view's indexes are empty but for the time of an upgrade.
_READ_KEYS = f"""
select s.security_id, s.portfolio_id, s.epoch, s.watermark_date, clock_timestamp() as now, tail.*,
       exists (select from outdated_histories o
               where o.security_id = s.security_id and o.portfolio_id = s.portfolio_id) as is_outdated
from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
join position_state s using (security_id, portfolio_id)
left join lateral (
    select {history.BASE_COLUMNS} from position_history h
    where h.security_id = s.security_id and h.portfolio_id = s.portfolio_id and h.superseded_epoch is null
    order by h.sequence desc
    limit 1
) as tail on true
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

_PORTION_ROWS = 20_000  # of history, in memory at a time: some 2 KB each while they are computed and written
_TICK = timedelta(microseconds=1)


@dataclass(slots=True)
class PositionOutcome:
    """Records ignored and in conflict; transactions appended; keys rebuilt, and transactions replayed for them.

    corrections: one for each security with keys that were rebuilt.
    """

    ignored: int
    conflicts: dict[int, str] = field(default_factory=dict)
    appended: int = 0
    rebuilt: int = 0
    replayed: int = 0
    corrections: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Locked:
    """The keys as they are stored, and the time that everything written for them will carry."""

    keys: dict[Key, KeyState]
    at: datetime


async def apply(
    connection: Connection,
    numbered: Sequence[tuple[int, Transaction]],
    method: CostBasisMethod,
    replay_rows: int = replay.ROWS,
) -> PositionOutcome:
    """Book the batch. Each key is appended to, or rebuilt once under a new epoch.

    No date closes meanwhile: closing an earlier one tells the keys there are, and would miss one being created.
    replay_rows: how many replayed transactions this transaction queues itself; the relay reads the rest from history.
    """
    await calendar.lock_shared(connection)
    stored = await transactions.store(connection, numbered)
    outcome = PositionOutcome(stored.ignored, stored.conflicts)
    bookings, outcome.corrections = await book(connection, booking.touches(stored.changes), method, replay_rows)
    for booked in bookings:
        if booked.plan.rebuilt_from is None:
            outcome.appended += booked.added
        else:
            outcome.rebuilt += 1
            outcome.replayed += booked.live_count
    return outcome


async def book(
    connection: Connection, touches: dict[Key, Touch], method: CostBasisMethod, replay_rows: int = replay.ROWS
) -> tuple[list[Booked], dict[str, int]]:
    """Write what the touches make of their keys, which come in lock order: history, epoch, watermark, outbox.

    What is in memory at a time is a portion of it, however long the histories are. Returns the keys booked, and the
    corrections of the securities with keys that were rebuilt.
    """
    if not touches:
        return [], {}
    before = await _lock(connection, touches)
    plans = await _plan(connection, touches, before.keys)
    booked = {plan.key: Booked(plan) for plan in plans}
    waiting = plans
    while waiting:
        rest = []
        for portion in booking.portions(waiting, _PORTION_ROWS):
            for part in await _book(connection, portion, method, before.at):
                booked[part.plan.key].add(part)
                if more := booking.rest(part):
                    rest.append(more)
        waiting = rest
    done = list(booked.values())
    await replay.rebuilt(connection, done, replay_rows)
    await holders.mark_closed(connection, done)
    return done, await _move(connection, plans, before.keys)


async def _lock(connection: Connection, touches: dict[Key, Touch]) -> _Locked:
    """Create what is missing, lock all in order, and read in a statement of its own what the wait has brought.

    The time is taken while the keys are held and after that of their last rows, so it grows per key even if the
    clock does not.
    """
    first = {key: touch.arrivals[0].position_date for key, touch in touches.items() if touch.arrivals}
    watermarks = [booking.day_before(day) for day in first.values()]
    created = {tuple(row) for row in await connection.fetch(_CREATE_KEYS, *key_columns(first), watermarks)}
    await connection.execute(_LOCK_KEYS, *key_columns(touches))
    keys: dict[Key, KeyState] = {}
    times: list[datetime] = []
    for row in await connection.fetch(_READ_KEYS, *key_columns(touches)):
        key = (row["security_id"], row["portfolio_id"])
        tail = None if row["sequence"] is None else history.base(row)
        if tail and row["is_outdated"]:
            tail = replace(tail, state=None)
        keys[key] = KeyState(row["epoch"], row["watermark_date"], tail, key in created)
        times += [row["now"], *([row["recorded_at"] + _TICK] if tail else [])]
    return _Locked(keys, max(times))


async def _plan(connection: Connection, touches: dict[Key, Touch], before: dict[Key, KeyState]) -> list[Plan]:
    """What each key needs; a rebuild starts after the last row that is certain to stay."""
    places = {key: touch.place for key, touch in touches.items() if booking.needs_rebuild(before[key], touch)}
    bases: dict[Key, Base] = {}
    first: dict[Key, list[Transaction]] = {}
    if places:
        found = await history.read_bases(connection, places)
        # A row without a cost state is no base: such a key is computed from its first transaction. So is a key whose
        # last row has none.
        usable = {key for key, state in before.items() if state.tail and state.tail.state}
        bases = {key: row for key, row in found.items() if row.state is not None and key in usable}
        if anew := found.keys() - bases.keys():
            first = await transactions.read_from(connection, dict.fromkeys(anew, (*booking.BEGINNING, 1)))
    return [
        booking.rebuild(key, before[key], touch, bases.get(key), first.get(key, ()))
        if key in places
        else booking.append(key, before[key], touch)
        for key, touch in touches.items()
    ]


async def _book(
    connection: Connection, portion: Sequence[Plan], method: CostBasisMethod, at: datetime
) -> list[Booking]:
    """Write the rows of a portion, and queue what it appends; its rebuilds are told when all their rows are there."""
    places = {plan.key: (*plan.after, plan.rows) for plan in portion if plan.rebuilt_from}
    found = await transactions.read_from(connection, places) if places else {}
    plans = [replace(plan, transactions=found.get(plan.key, plan.transactions)) for plan in portion]
    bookings = await _compute(connection, plans, method)
    await history.write(connection, bookings, at)
    await replay.appended(connection, bookings)
    return bookings


async def _compute(connection: Connection, plans: Sequence[Plan], method: CostBasisMethod) -> list[Booking]:
    """Compute the rows, with the lots that their disposals take read before."""
    wanted = [
        (*plan.key, plan.state.head.sequence, plan.kept, units)
        for plan in plans
        if plan.state.head and (units := costing.units_needed(plan.state, plan.transactions))
    ]
    lots = await history.read_lots(connection, wanted) if wanted else {}
    return [
        Booking(plan, costing.run(plan.state, plan.kept, plan.transactions, method, lots.get(plan.key, ())))
        for plan in plans
    ]


async def _move(connection: Connection, plans: Sequence[Plan], before: dict[Key, KeyState]) -> dict[str, int]:
    """Epochs and watermarks; the securities of keys that became due are told last, as the lock order demands."""
    lowered: dict[str, date] = {}
    rebuilt: dict[str, date] = {}
    for plan in plans:
        security = plan.key[0]
        stored = before[plan.key]
        if stored.is_new or plan.watermark < stored.watermark:
            lowered[security] = min(lowered.get(security, plan.watermark), plan.watermark)
        if plan.rebuilt_from:
            rebuilt[security] = min(rebuilt.get(security, plan.rebuilt_from), plan.rebuilt_from)
    if not (lowered or rebuilt):
        return {}
    await corrections.lock_securities(connection, [*lowered, *rebuilt])
    seqs = await corrections.record(connection, list(rebuilt.items()), "transaction") if rebuilt else {}
    moved = [p for p in plans if p.rebuilt_from or p.watermark != before[p.key].watermark]
    if moved:
        latest = await calendar.latest_closed(connection)
        rows = [(*p.key, p.epoch, p.watermark, seqs[p.key[0]] if p.rebuilt_from else None) for p in moved]
        await connection.execute(_MOVE_KEYS, *columns(rows), latest)
    if lowered:
        await connection.execute(_LOWER, list(lowered), list(lowered.values()))
    return seqs
