"""What a batch writes for a key: appended, or rebuilt from the earliest touched place on."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from sinks import booking, costing
from sinks.booking import Entry, KeyState, Tail, Touch
from sinks.costing import CostState
from sinks.model import Transaction

KEY = ("S", "P")
DAY = [date(2025, 1, day) for day in range(1, 29)]


def buy(number: int, day: int, kind: str = "BUY") -> Transaction:
    moment = datetime(2025, 1, day, 10, tzinfo=UTC)
    return Transaction(f"T{number}", "P", "S", moment, kind, Decimal(10), Decimal(1), Decimal(10 * number))


def entries(*transactions: Transaction) -> list[Entry]:
    made: list[Entry] = []
    for transaction in transactions:
        state = costing.apply(made[-1].state if made else CostState(), transaction, "FIFO")
        made.append(Entry(len(made) + 1, transaction, state))
    return made


def stored(watermark: date, *history: Transaction, epoch: int = 3) -> KeyState:
    rows = entries(*history)
    tail = Tail(len(rows), rows[-1].transaction.order, rows[-1].state) if rows else None
    return KeyState(epoch, watermark, tail, not rows)


def test_arrivals_are_appended_after_the_tail() -> None:
    old, new = [buy(1, 1), buy(2, 3)], [buy(3, 5), buy(4, 6)]
    booked = booking.append(KEY, stored(DAY[3], *old), Touch(new), "FIFO")
    assert (booked.key, booked.epoch, booked.kept, booked.rebuilt_from, booked.live) == (KEY, 3, 2, None, ())
    assert list(booked.entries) == entries(*old, *new)[2:]
    assert booked.tail == booked.entries[-1]
    assert booked.watermark == DAY[3]


def test_the_first_of_a_key_makes_its_own_date_dirty() -> None:
    booked = booking.append(KEY, stored(DAY[9]), Touch([buy(1, 5)]), "FIFO")
    assert (booked.kept, booked.watermark, list(booked.entries)) == (0, DAY[3], entries(buy(1, 5)))


def test_an_arrival_on_the_watermark_itself_makes_that_date_dirty_again() -> None:
    old = stored(DAY[9], buy(1, 1))
    touch = Touch([buy(2, 10)])
    assert not booking.needs_rebuild(old, touch)
    assert booking.append(KEY, old, touch, "FIFO").watermark == DAY[8]
    assert booking.needs_rebuild(old, Touch([buy(2, 9)]))


def test_what_sorts_before_the_tail_or_corrects_needs_a_rebuild() -> None:
    old = stored(DAY[0], buy(1, 5))
    assert booking.needs_rebuild(old, Touch([buy(0, 5)]))  # the same moment, a smaller id
    assert not booking.needs_rebuild(old, Touch([buy(2, 5)]))
    assert booking.needs_rebuild(old, Touch([buy(9, 20)], corrected=buy(1, 5).order))
    assert not booking.needs_rebuild(stored(DAY[0]), Touch([buy(1, 5)]))


def test_a_rebuild_starts_at_the_earliest_touched_place() -> None:
    live = [buy(1, 1), buy(2, 3), buy(3, 5), buy(4, 7)]
    touch = Touch([live[2]], corrected=buy(9, 6).order)
    booked = booking.rebuild(KEY, stored(DAY[20], live[0], live[1], live[3]), touch, live, "FIFO")
    assert (booked.key, booked.epoch, booked.kept, booked.rebuilt_from) == (KEY, 4, 2, DAY[4])
    assert list(booked.entries) == entries(*live)[2:]
    assert (booked.tail, booked.live, booked.watermark) == (booked.entries[-1], live, DAY[3])


def test_a_rebuild_after_the_watermark_leaves_it() -> None:
    live = [buy(1, 1), buy(3, 5)]
    booked = booking.rebuild(KEY, stored(DAY[1], *live), Touch(corrected=live[1].order), live, "AVCO")
    assert (booked.watermark, booked.rebuilt_from, booked.kept) == (DAY[1], DAY[4], 1)


def test_a_cancelled_end_leaves_the_row_before_as_the_tail() -> None:
    live = [buy(1, 1), buy(2, 3)]
    booked = booking.rebuild(KEY, stored(DAY[9], *live, buy(3, 5)), Touch(corrected=buy(3, 5).order), live, "FIFO")
    assert (list(booked.entries), booked.kept, booked.tail) == ([], 2, entries(*live)[-1])


def test_a_key_left_empty_has_no_tail() -> None:
    booked = booking.rebuild(KEY, stored(DAY[9], buy(1, 5)), Touch(corrected=buy(1, 5).order), [], "FIFO")
    assert (list(booked.entries), booked.kept, booked.tail, booked.watermark) == ([], 0, None, DAY[3])


def test_the_method_counts() -> None:
    history = [buy(1, 1), buy(3, 2)]
    sale = buy(9, 3, "SELL")
    for method, cost in (("FIFO", 30), ("AVCO", 20)):
        booked = booking.rebuild(KEY, stored(DAY[9]), Touch([history[0]]), [*history, sale], method)  # type: ignore[arg-type]
        assert booked.entries[-1].state.cost_basis == cost
    fifo = stored(DAY[0], *history)
    assert booking.append(KEY, fifo, Touch([sale]), "FIFO").entries[-1].state.cost_basis == 30


def test_the_day_before_is_a_day_before() -> None:
    assert booking.day_before(DAY[5]) == DAY[5] - timedelta(days=1)
