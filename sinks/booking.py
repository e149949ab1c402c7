"""What a batch of transactions does to a key: append or rebuild. Pure (design, Position sink; semantics, What is late).

A rebuild makes one new epoch, however many records of the batch ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from sinks import costing
from sinks.costing import CostState
from sinks.model import CostBasisMethod, Transaction
from sinks.transactions import Change

Key = tuple[str, str]
Order = tuple[datetime, bytes]


@dataclass(slots=True)
class Touch:
    """What a batch brings to a key: transactions that were not in its history, and the earliest place corrected."""

    arrivals: list[Transaction] = field(default_factory=list)
    corrected: Order | None = None

    def correct(self, place: Order) -> None:
        """History is wrong from this place on."""
        self.corrected = place if self.corrected is None else min(self.corrected, place)


@dataclass(frozen=True, slots=True)
class Tail:
    """The last transaction of a key's live history, and the cost state after it."""

    sequence: int
    order: Order
    state: CostState


@dataclass(frozen=True, slots=True)
class KeyState:
    """A key as it is stored. is_new: it came into being with this batch."""

    epoch: int
    watermark: date
    tail: Tail | None
    is_new: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of history: the state after its transaction."""

    sequence: int
    transaction: Transaction
    state: CostState


@dataclass(frozen=True, slots=True)
class Booking:
    """What is to be written for a key. Entries follow on the first `kept` rows of the live history."""

    key: Key
    epoch: int
    watermark: date
    kept: int
    entries: Sequence[Entry]
    tail: Entry | None
    """The last row of the live history from now on."""
    rebuilt_from: date | None = None
    live: Sequence[Transaction] = ()
    """After a rebuild: the whole live history, for the replay."""


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
    """Whether the batch changes what is in the history, or puts something before its end or before the watermark."""
    if touch.corrected is not None:
        return True
    first = touch.arrivals[0]
    if stored.tail and first.order < stored.tail.order:
        return True
    return first.position_date < stored.watermark


def append(key: Key, stored: KeyState, touch: Touch, method: CostBasisMethod) -> Booking:
    """The arrivals after the tail; those dated on the watermark itself make that date dirty again."""
    kept = stored.tail.sequence if stored.tail else 0
    state = stored.tail.state if stored.tail else CostState()
    watermark = min(stored.watermark, day_before(touch.arrivals[0].position_date))
    entries = _entries(touch.arrivals, state, kept, method)
    return Booking(key, stored.epoch, watermark, kept, entries, entries[-1])


def rebuild(key: Key, stored: KeyState, touch: Touch, live: Sequence[Transaction], method: CostBasisMethod) -> Booking:
    """A new epoch from the earliest touched place on. live: every transaction that now takes part, in order."""
    places = [arrival.order for arrival in touch.arrivals[:1]]
    place = min(places if touch.corrected is None else [touch.corrected, *places])
    kept = sum(transaction.order < place for transaction in live)
    state = CostState()
    for transaction in live[:kept]:
        state = costing.apply(state, transaction, method)
    day = place[0].astimezone(UTC).date()
    watermark = min(stored.watermark, day_before(day))
    entries = _entries(live[kept:], state, kept, method)
    tail = entries[-1] if entries else Entry(kept, live[kept - 1], state) if kept else None
    return Booking(key, stored.epoch + 1, watermark, kept, entries, tail, day, live)


def _entries(transactions: Sequence[Transaction], state: CostState, kept: int, method: CostBasisMethod) -> list[Entry]:
    entries = []
    for sequence, transaction in enumerate(transactions, kept + 1):
        state = costing.apply(state, transaction, method)
        entries.append(Entry(sequence, transaction, state))
    return entries
