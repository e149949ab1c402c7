"""What a batch of transactions does to a key: append or rebuild. Pure (design, Position sink; semantics, What is late).

A rebuild makes one new epoch, however many records of the batch ask for it. It starts at the last row of history that
nothing in the batch touches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta

from sinks.costing import CostState, Entry
from sinks.model import Transaction
from sinks.transactions import Change

Key = tuple[str, str]
Order = tuple[datetime, bytes]

BEGINNING: Order = (datetime(1, 1, 2, tzinfo=UTC), b"")
"""Before every transaction."""


@dataclass(slots=True)
class Touch:
    """What a batch brings to a key: transactions that were not in its history, and the earliest place corrected."""

    arrivals: list[Transaction] = field(default_factory=list)
    corrected: Order | None = None

    def correct(self, place: Order) -> None:
        """History is wrong from this place on."""
        self.corrected = place if self.corrected is None else min(self.corrected, place)

    @property
    def place(self) -> Order:
        """The earliest place that the batch touches, in the old history or the new."""
        places = [arrival.order for arrival in self.arrivals[:1]]
        return min(places if self.corrected is None else [self.corrected, *places])


@dataclass(frozen=True, slots=True)
class Base:
    """A row of live history and the cost state after it; state is None where no booking may go on from it."""

    sequence: int
    order: Order
    state: CostState | None


@dataclass(frozen=True, slots=True)
class KeyState:
    """A key as it is stored; tail: the last row of its live history. is_new: it came into being with this batch."""

    epoch: int
    watermark: date
    tail: Base | None
    is_new: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written for a key: rows for the transactions that follow on the first `kept` of the live history.

    rebuilt_from: the first day whose books a new epoch changes; None: an append. Of a rebuild the transactions behind
    the place `after` are read when their turn comes, about `rows` of them.
    """

    key: Key
    epoch: int
    watermark: date
    kept: int
    state: CostState
    transactions: Sequence[Transaction] = ()
    rebuilt_from: date | None = None
    after: Order = BEGINNING
    rows: int = 0
    continues: bool = False
    """Not the first part: its epoch has begun."""

    @property
    def size(self) -> int:
        """Rows that the plan makes, about."""
        return len(self.transactions) or self.rows


@dataclass(frozen=True, slots=True)
class Booking:
    """A plan carried out, or a part of it."""

    plan: Plan
    entries: Sequence[Entry]


@dataclass(slots=True)
class Booked:
    """A key when all of its plan is carried out. added: rows written; last: what the last of them says."""

    plan: Plan
    added: int = 0
    last: Entry | None = None

    def add(self, booking: Booking) -> None:
        """Count a part in."""
        self.added += len(booking.entries)
        self.last = booking.entries[-1] if booking.entries else self.last

    @property
    def live_count(self) -> int:
        """Rows of the key's live history from now on."""
        return self.plan.kept + self.added


def touches(changes: Iterable[Change]) -> dict[Key, Touch]:
    """The keys that the changes touch, in the order in which keys are locked.

    What took part is corrected at its old place, what takes part now arrives at its new one: an amendment does both
    to one key, a move to two. A cancelled transaction that never took part touches nothing.
    """
    found: dict[Key, Touch] = {}
    for change in changes:
        old = change.old if change.old and not change.old.cancelled else None
        new = change.new if not change.new.cancelled else None
        if old:
            found.setdefault(old.key, Touch()).correct(old.order)
        if new:
            found.setdefault(new.key, Touch()).arrivals.append(new)
    for touch in found.values():
        touch.arrivals.sort(key=lambda t: t.order)
    return dict(sorted(found.items(), key=lambda item: lock_order(item[0])))


def lock_order(key: Key) -> tuple[bytes, bytes]:
    """Keys sort by the bytes of their ids, as Postgres does under collation "C"."""
    return (key[0].encode(), key[1].encode())


def day_before(day: date) -> date:
    """The watermark that makes the day dirty."""
    return day - timedelta(days=1)


def needs_rebuild(stored: KeyState, touch: Touch) -> bool:
    """Whether the batch changes what is in the history, or puts something before its end or before the watermark.

    So does any change of a history whose last row has no cost state to go on from. A new key that does not begin at
    epoch 0 may have been seen before by consumers, and begins with a marker.
    """
    if touch.corrected is not None or (stored.is_new and stored.epoch):
        return True
    first = touch.arrivals[0]
    if stored.tail and (first.order < stored.tail.order or stored.tail.state is None):
        return True
    return first.position_date < stored.watermark


def append(key: Key, stored: KeyState, touch: Touch) -> Plan:
    """The arrivals after the tail; those dated on the watermark itself make that date dirty again."""
    watermark = min(stored.watermark, day_before(touch.arrivals[0].position_date))
    return Plan(key, stored.epoch, watermark, *_after(stored.tail), touch.arrivals)


def rebuild(key: Key, stored: KeyState, touch: Touch, base: Base | None, first: Sequence[Transaction] = ()) -> Plan:
    """A new epoch from the earliest touched place on, or from the first transaction where there is no base.

    base: the last row before that place, or None to start from nothing; first: then the first of the transactions, if
    it may lie before the place.
    """
    begins = min([touch.place, *(t.order for t in first)])
    day = begins[0].astimezone(UTC).date()
    watermark = min(stored.watermark, day_before(day))
    kept, state = _after(base)
    rows = (stored.tail.sequence - kept if stored.tail else 0) + len(touch.arrivals) + 1  # one more: that was all
    after = base.order if base else BEGINNING
    return Plan(key, stored.epoch + 1, watermark, kept, state, rebuilt_from=day, after=after, rows=rows)


def rest(booking: Booking) -> Plan | None:
    """What is left of a rebuild whose part brought as many transactions as were asked for: more may follow.

    It goes on under the same epoch as an append would. Twice as many are asked for: the reckoning was too low.
    """
    plan = booking.plan
    if len(booking.entries) < plan.rows or plan.rows == 0:
        return None
    last = booking.entries[-1]
    return replace(
        plan,
        kept=last.sequence,
        state=last.state,
        transactions=(),
        after=last.transaction.order,
        rows=2 * plan.rows,
        continues=True,
    )


def portions(plans: Iterable[Plan], rows: int) -> Iterator[list[Plan]]:
    """The plans in their order, so many at a time that they make at most `rows` rows; a larger one is cut to that."""
    portion: list[Plan] = []
    size = 0
    for plan in plans:
        if portion and size + min(plan.size, rows) > rows:
            yield portion
            portion, size = [], 0
        portion.append(replace(plan, rows=rows) if plan.rows > rows else plan)
        size += min(plan.size, rows)
    if portion:
        yield portion


def _after(base: Base | None) -> tuple[int, CostState]:
    if base is None:
        return 0, CostState()
    assert base.state is not None
    return base.sequence, base.state
