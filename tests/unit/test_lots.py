"""Lots as they are stored and read again: which are needed, who opened them, and what splits make of them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from sinks import costing
from sinks.costing import CostState, Lot, LotsMissing
from tests.costs import in_parts
from tests.unit.test_costing import TENTH, figures, trades

_THREE = [("BUY", 10, 100), ("BUY", 10, 200), ("BUY", 10, 300)]
_SHORT = [("SELL", 10, 100), ("SELL", 10, 200), ("SELL", 10, 300)]


@pytest.mark.parametrize(
    ("held", "then", "units"),
    [
        (_THREE, [("SELL", 15, 0)], 5),
        (_THREE, [("TRANSFER_OUT", 15, 0)], 5),
        (_THREE, [("SELL", 5, 0)], 0),
        (_THREE, [("SELL", 15, 0), ("SELL", 5, 0)], 10),
        (_THREE, [("SELL", 30, 0)], 0),  # all: the totals know what it cost
        (_THREE, [("SELL", 40, 0)], 0),
        (_THREE, [("SELL", 15, 0), ("SELL", 15, 0), ("BUY", 9, 0), ("SELL", 8, 0)], 5),  # what comes after is new
        (_THREE, [("BUY", 10, 0), ("SELL", 35, 0)], 20),  # not more than there is
        (_THREE, [("SELL", 20, 0), ("BUY", 5, 0), ("SELL", 14, 0)], 20),
        (_THREE, [("SELL", 12, 0), ("TRANSFER_IN", 15, 0), ("SELL", 4, 0)], 6),
        (_THREE, [("SELL", 12, 0), ("SPLIT", 2, 0)], 20),  # a split states them all anew
        (_THREE, [("SELL", 30, 0), ("SPLIT", 2, 0)], 0),  # but what is no longer held
        (_THREE, [("SELL", 30, 0), ("BUY", 4, 0), ("SPLIT", 2, 0), ("SELL", 1, 0)], 0),
        (_THREE, [("SPLIT", "1e-13", 0)], 0),  # nor what it leaves nothing of
        (_THREE, [("SPLIT", "1e29", 0), ("SELL", 15, 0)], 5),  # out of range: it changes nothing
        (_THREE, [("BUY", 0, 7), ("TRANSFER_IN", 0, 7), ("SELL", 0, 7), ("SELL", 15, 0)], 5),
        (_THREE, [("DIVIDEND", 30, 7), ("FEE", 0, 3), ("SELL", 15, 0)], 5),
        (_THREE, [("BUY", 10, 0)], 0),
        (_SHORT, [("BUY", 15, 0)], 5),
        (_SHORT, [("TRANSFER_IN", 15, 0), ("SELL", 3, 0), ("BUY", 2, 0)], 7),
        (_SHORT, [("BUY", 30, 0)], 0),
        ([("BUY", 10, 100), ("SELL", 10, 100)], [("BUY", 5, 0), ("SELL", 1, 0)], 0),
    ],
)
def test_units_needed_of_the_lots_behind_the_head(held: list[Any], then: list[Any], units: Any) -> None:
    state = costing.run(CostState(), 0, trades(*held), "FIFO")[-1].state
    assert costing.units_needed(state, trades(*then)) == Decimal(units)


@pytest.mark.parametrize(
    ("rows", "opened"),
    [
        ([("BUY", 10, 100, 2)], (10, 102)),
        ([("TRANSFER_IN", 10, 100)], (10, 100)),
        ([("SELL", 10, 100, 2)], (-10, -98)),
        ([("TRANSFER_OUT", 10, 0)], (-10, 0)),
    ],
)
def test_a_lot_is_of_the_transaction_that_opened_it(rows: list[Any], opened: tuple[int, int]) -> None:
    history = trades(*rows)
    (entry,) = costing.run(CostState(), 6, history, "FIFO")
    assert (entry.sequence, entry.transaction) == (7, history[0])
    assert entry.opened == Lot(7, *figures(*opened))
    assert entry.state.head == entry.opened


def test_rows_go_on_counting_where_the_kept_ones_end() -> None:
    entries = costing.run(CostState(), 3, trades(*_THREE, ("SELL", 15, 0)), "FIFO")
    assert [entry.sequence for entry in entries] == [4, 5, 6, 7]
    assert [entry.state.head.sequence for entry in entries if entry.state.head] == [4, 4, 4, 5]


def test_a_split_states_the_lots_behind_the_head_anew() -> None:
    """The second split multiplies the second lot and what the first one has made; neither reaches a later lot."""
    rows = [("BUY", 10, 100), ("BUY", 10, 100), ("SPLIT", 2, 0), ("BUY", 10, 300), ("SPLIT", 3, 0), ("BUY", 10, 60)]
    entries = costing.run(CostState(), 0, trades(*rows), "FIFO")
    assert [entry.restated for entry in entries] == [
        (), (), (Lot(2, *figures(20, 100)),), (), (Lot(2, *figures(60, 100)), Lot(4, *figures(30, 300))), ()
    ]  # fmt: skip
    state = entries[-1].state
    assert state.head == Lot(1, *figures(60, 100))
    lots = [*entries[4].restated, *(entry.opened for entry in entries[5:] if entry.opened)]
    sold = costing.run(state, 6, trades(("SELL", 135, 0), ("SELL", 20, 0)), "FIFO", lots)
    assert [entry.state.cost_basis for entry in sold] == list(figures(560 - 200 - 150, 560 - 200 - 300 - 30))
    assert [entry.state.head for entry in sold] == [Lot(4, *figures(15, 150)), Lot(6, *figures(5, 30))]


def test_a_lot_that_is_alone_after_a_split_is_of_that_row() -> None:
    """So that nothing which an earlier split has stated lies behind it."""
    rows = [("BUY", 3, 1), ("BUY", "2e-10", 2), ("SPLIT", 2, 0), ("SPLIT", "0.1", 0), ("BUY", 1, 5)]
    entries = costing.run(CostState(), 0, trades(*rows), "FIFO")
    assert entries[2].restated == (Lot(2, *figures("4e-10", 2)),)
    assert entries[3].restated == ()
    assert entries[3].state.head == Lot(4, *figures("0.6", 3))
    assert in_parts(trades(*rows, ("SELL", 1, 0)), [5], "FIFO")[-1].state.cost_basis == 3


@pytest.mark.parametrize(
    ("rows", "head", "restated"),
    [
        # Sums of 0.4, 0.8, 1.2 times 1e-10: nothing, 1, and 1 as before.
        ([4, 4, 4], (4, "1e-10", 111), []),
        ([4, 4, 10, 2], (2, "1e-10", 11), [(3, "1e-10", 1100)]),
        ([10, 4, 10], (1, "1e-10", 1), [(3, "1e-10", 110)]),
        ([10, 3, 1], (4, "1e-10", 111), []),
    ],
)
def test_a_lot_of_which_nothing_is_left_gives_its_cost_to_the_next_and_the_last_to_the_one_before(
    rows: list[int], head: Any, restated: list[Any]
) -> None:
    """Lots of so many times 1e-10, which cost 1, 10, 100, 1000; the split leaves a tenth of them."""
    history = [("BUY", n * TENTH, 10**place) for place, n in enumerate(rows)]
    *_, last = costing.run(CostState(), 0, trades(*history, ("SPLIT", "0.1", 0)), "FIFO")
    sequence = head[0] if restated else len(rows) + 1
    assert last.state.head == Lot(sequence, *figures(*head[1:]))
    assert list(last.restated) == [Lot(place, *figures(*lot)) for place, *lot in restated]


@pytest.mark.parametrize(
    ("rows", "head", "opened"),
    [
        ([("BUY", 0, 7)], (1, 10, 107), None),  # the head is the only one, and the state has it
        ([("BUY", 10, 1), ("BUY", 0, 7)], (1, 10, 100), (3, 0, 7)),
        ([("BUY", 10, 1), ("BUY", 0, 7), ("SELL", 15, 0)], (3, 5, 4), None),  # half of 8
        ([("BUY", 10, 1), ("SELL", 10, 0), ("BUY", 0, 7)], (1, 0, 0), (4, 0, 7)),  # the head is used up
        ([("SELL", 10, 0), ("BUY", 0, 7)], None, None),  # nothing is open
        ([("SELL", 30, 60), ("TRANSFER_IN", 0, 7)], (2, -20, -33), None),
        ([("BUY", 10, 1), ("BUY", 0, 0)], (1, 10, 100), None),
    ],
)
def test_a_cost_without_units_goes_to_the_newest_open_lot(rows: list[Any], head: Any, opened: Any) -> None:
    *_, last = costing.run(CostState(), 0, trades(("BUY", 10, 100), *rows), "FIFO")
    assert last.state.head == (head and Lot(head[0], *figures(*head[1:])))
    assert last.opened == (opened and Lot(opened[0], *figures(*opened[1:])))


def test_a_sale_without_units_realizes_what_it_brings() -> None:
    rows = [("SELL", 0, 10, 3), ("BUY", 1, 5), ("SELL", 0, 10, 3), ("TRANSFER_OUT", 0, 9)]
    *_, last = costing.run(CostState(), 0, trades(*rows), "FIFO")
    assert (last.state.quantity, last.state.cost_basis, last.state.realized) == figures(1, 5, 14)


def test_lots_that_were_not_read_are_never_taken_for_others() -> None:
    """A cost without units joins the newest lot, which is none of those that were read."""
    state = costing.run(CostState(), 0, trades(*_THREE), "FIFO")[-1].state
    *_, last = costing.run(state, 3, trades(("BUY", 0, 7), ("SELL", 15, 0)), "FIFO", [Lot(2, *figures(10, 200))])
    assert last.state.head == Lot(2, *figures(5, 100))
    with pytest.raises(LotsMissing):
        costing.run(state, 3, trades(("SELL", 25, 0)), "FIFO", [Lot(2, *figures(10, 200))])
    with pytest.raises(LotsMissing):
        costing.run(state, 3, trades(("SPLIT", 2, 0)), "FIFO", [Lot(2, *figures(10, 200))])
