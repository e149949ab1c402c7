"""What a batch does to a key: which keys it touches and from where, append or rebuild, epoch and watermark."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from sinks import booking
from sinks.booking import Base, Booked, Booking, KeyState, Plan, Touch
from sinks.costing import CostState, Entry
from sinks.model import Transaction
from sinks.transactions import Change

KEY = ("S", "P")
HELD = CostState(Decimal(5), Decimal(50))


def at(day: int, hour: int = 10) -> datetime:
    return datetime(2025, 9, day, hour, tzinfo=UTC)


def trade(name: str, when: datetime, security: str = "S", portfolio: str = "P", **more: object) -> Transaction:
    five = Decimal(5)
    return Transaction(name, portfolio, security, when, "BUY", five, Decimal(10), Decimal(50), **more)  # type: ignore[arg-type]


def stored(watermark: int, tail: Base | None = None, epoch: int = 3) -> KeyState:
    return KeyState(epoch, date(2025, 9, watermark), tail, is_new=False)


def tail(when: datetime, name: str = "m", state: CostState | None = HELD) -> Base:
    return Base(7, (when, name.encode()), state)


# -- touches -------------------------------------------------------------------------------------------------------


def test_a_new_transaction_arrives() -> None:
    new = trade("a", at(2))
    assert booking.touches([Change(None, new)]) == {KEY: Touch([new])}


def test_an_amendment_corrects_the_old_place_and_arrives_at_the_new_one() -> None:
    old, new = trade("a", at(4)), trade("a", at(2), revision=1)
    (touch,) = booking.touches([Change(old, new)]).values()
    assert touch == Touch([new], old.order)
    assert touch.place == new.order


def test_a_move_touches_both_keys() -> None:
    old, new = trade("a", at(4)), trade("a", at(4), portfolio="Q", revision=1)
    assert booking.touches([Change(old, new)]) == {KEY: Touch([], old.order), ("S", "Q"): Touch([new])}


def test_a_cancellation_corrects_its_place_and_nothing_arrives() -> None:
    old = trade("a", at(4))
    found = booking.touches([Change(old, trade("a", at(2), revision=1, cancelled=True))])
    assert found == {KEY: Touch([], old.order)}
    assert found[KEY].place == old.order


def test_what_never_took_part_touches_nothing() -> None:
    gone = trade("a", at(4), cancelled=True)
    assert booking.touches([Change(None, gone), Change(gone, trade("a", at(3), revision=1, cancelled=True))]) == {}


def test_what_is_cancelled_no_longer_arrives_as_new() -> None:
    gone, back = trade("a", at(4), cancelled=True), trade("a", at(3), revision=1)
    assert booking.touches([Change(gone, back)]) == {KEY: Touch([back])}


def test_the_earliest_of_several_places_counts_and_arrivals_are_in_order() -> None:
    late, early = trade("a", at(4)), trade("b", at(2))
    changes = [Change(old, trade(old.transaction_id, at(5), revision=1, cancelled=True)) for old in (late, early, late)]
    arrivals = [Change(None, trade("z", at(6))), Change(None, trade("c", at(6))), Change(None, trade("d", at(3)))]
    (touch,) = booking.touches([*changes, *arrivals]).values()
    assert touch.corrected == touch.place == early.order
    assert [t.transaction_id for t in touch.arrivals] == ["d", "c", "z"]


def test_an_arrival_before_the_corrected_place_is_the_place() -> None:
    touch = Touch([trade("b", at(2)), trade("a", at(9))], trade("c", at(5)).order)
    assert touch.place == trade("b", at(2)).order


def test_keys_come_in_the_order_in_which_postgres_locks_them() -> None:
    """By bytes: capitals first, what is beyond the BMP (four bytes) after what is not, whatever UTF-16 makes of it."""
    names = ["ﬀ", "a", "😀", "B", "ä"]
    changes = [Change(None, trade(f"{s}{p}", at(2), s, p)) for s in names for p in names]
    ordered = ["B", "a", "ä", "ﬀ", "😀"]
    assert list(booking.touches(changes)) == [(s, p) for s in ordered for p in ordered]


# -- append or rebuild ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "touch", "expected"),
    [
        (stored(1), Touch([trade("a", at(2))]), False),
        (stored(2), Touch([trade("a", at(2))]), False),  # dated on the watermark: that date is dirty again, no more
        (stored(3), Touch([trade("a", at(2, 23))]), True),  # before it: late
        (stored(1, tail(at(2))), Touch([trade("n", at(2))]), False),  # after the tail by its id
        (stored(1, tail(at(2))), Touch([trade("a", at(2))]), True),
        (stored(1, tail(at(2))), Touch([trade("a", at(2, 9))]), True),
        (stored(1, tail(at(2))), Touch([trade("a", at(2, 11))]), False),
        (stored(1, tail(at(2), state=None)), Touch([trade("a", at(3))]), True),  # nothing to go on from
        (stored(1), Touch([], trade("a", at(2)).order), True),
        (stored(1), Touch([trade("a", at(3))], trade("a", at(9)).order), True),
        (stored(3), Touch([trade("a", datetime(2025, 9, 3, 1, tzinfo=timezone(timedelta(hours=2))))]), True),
    ],
)
def test_late_is_what_the_history_or_the_watermark_has_passed(state: KeyState, touch: Touch, expected: bool) -> None:
    assert booking.needs_rebuild(state, touch) is expected


def test_an_append_goes_on_after_the_tail_under_the_same_epoch() -> None:
    new = trade("n", at(4))
    assert booking.append(KEY, stored(2, tail(at(2))), Touch([new])) == Plan(KEY, 3, date(2025, 9, 2), 7, HELD, [new])


def test_an_append_on_the_watermark_makes_that_date_dirty() -> None:
    plan = booking.append(KEY, stored(4), Touch([trade("a", at(4)), trade("b", at(5))]))
    assert (plan.watermark, plan.kept, plan.state, plan.rebuilt_from) == (date(2025, 9, 3), 0, CostState(), None)


def test_a_rebuild_is_a_new_epoch_from_the_earliest_place() -> None:
    base, last = tail(at(1)), Base(9, (at(8), b"m"), HELD)
    plan = booking.rebuild(KEY, stored(9, last), Touch([trade("b", at(3))], trade("x", at(5)).order), base)
    assert plan == Plan(
        KEY, 4, date(2025, 9, 2), 7, HELD, rebuilt_from=date(2025, 9, 3), after=base.order, rows=2 + 1 + 1
    )


def test_a_rebuild_raises_no_watermark_and_begins_with_nothing_without_a_base() -> None:
    plan = booking.rebuild(KEY, stored(1), Touch([], trade("x", at(5)).order), None)
    assert plan == Plan(KEY, 4, date(2025, 9, 1), 0, CostState(), rebuilt_from=date(2025, 9, 5), rows=1)
    assert plan.after == booking.BEGINNING


def test_the_day_of_a_rebuild_is_that_of_utc() -> None:
    west = datetime(2025, 9, 5, 22, tzinfo=timezone(-timedelta(hours=5)))
    plan = booking.rebuild(KEY, stored(9), Touch([trade("a", west)]), None)
    assert (plan.rebuilt_from, plan.watermark) == (date(2025, 9, 6), date(2025, 9, 5))


def test_a_base_without_a_cost_state_is_refused() -> None:
    with pytest.raises(AssertionError):
        booking.append(KEY, stored(1, tail(at(1), state=None)), Touch([trade("a", at(3))]))


def test_the_live_history_is_what_is_kept_and_what_is_written() -> None:
    new = trade("n", at(4))
    plan = booking.append(KEY, stored(2, tail(at(2))), Touch([new]))
    booked = Booked(plan)
    booked.add(Booking(plan, [Entry(8, new, HELD)]))
    booked.add(Booking(plan, []))
    assert (booked.live_count, booked.last) == (8, Entry(8, new, HELD))


# -- portions ------------------------------------------------------------------------------------------------------


def rebuilds(*rows: int) -> list[Plan]:
    return [
        Plan((f"S{n}", "P"), 1, date(2025, 9, 1), 0, HELD, (), date(2025, 9, 2), rows=r) for n, r in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3, 3, 4), [(3, 3, 4)]),
        ((3, 3, 5), [(3, 3), (5,)]),
        ((10, 1, 9, 1), [(10,), (1, 9), (1,)]),
        ((2, 25, 2), [(2,), (10,), (2,)]),
        ((), []),
    ],
)
def test_portions_hold_no_more_rows_than_are_allowed(sizes: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    found = list(booking.portions(rebuilds(*sizes), 10))
    assert [tuple(plan.rows for plan in portion) for portion in found] == expected
    assert [plan.key for portion in found for plan in portion] == [plan.key for plan in rebuilds(*sizes)]


def test_appends_count_by_what_arrives() -> None:
    arrivals = [trade(f"t{n}", at(4)) for n in range(6)]
    plans = [booking.append((f"S{n}", "P"), stored(1), Touch(arrivals)) for n in range(3)]
    assert [len(portion) for portion in booking.portions(plans, 12)] == [2, 1]
    assert [len(portion) for portion in booking.portions(plans, 5)] == [1, 1, 1]  # as it came, it is in memory anyway


def test_a_rebuild_that_got_all_it_asked_for_goes_on_behind_it() -> None:
    (plan,) = rebuilds(2)
    first, second = trade("a", at(2)), trade("b", at(3))
    part = replace(plan, transactions=[first, second])
    after = CostState(Decimal(10), Decimal(100))
    left = booking.rest(Booking(part, [Entry(1, first, HELD), Entry(2, second, after)]))
    assert left == replace(plan, kept=2, state=after, after=second.order, rows=4, continues=True)
    assert booking.rest(Booking(part, [Entry(1, first, HELD)])) is None
    assert booking.rest(Booking(part, [])) is None


def test_an_append_leaves_nothing() -> None:
    new = trade("n", at(4))
    plan = booking.append(KEY, stored(2, tail(at(2))), Touch([new]))
    assert booking.rest(Booking(plan, [Entry(8, new, HELD)])) is None
