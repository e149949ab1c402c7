"""Lots as they are stored and read again: which are needed, who opened them, and what splits make of them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from sinks import costing
from sinks.costing import CostState, Lot, Split
from tests.unit.test_costing import figures, trades

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
        (_THREE, [("SPLIT", 2, 0), ("SELL", 30, 0)], 5),  # units as they were before the split
        (_THREE, [("SPLIT", 2, 0), ("SELL", 59, 0)], "19.5"),
        (_THREE, [("SPLIT", 2, 0), ("SELL", 60, 0)], 0),
        (_THREE, [("SPLIT", "0.5", 0), ("SELL", 8, 0)], 6),
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


def test_a_share_of_a_third_is_as_exact_as_the_costs() -> None:
    state = costing.run(CostState(), 0, trades(*_THREE), "FIFO")[-1].state
    found = costing.units_needed(state, trades(("SPLIT", 3, 0), ("SELL", 50, 0)))
    assert abs(found - Decimal("6." + "6" * 50)) < Decimal("1e-50")


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


def test_splits_concern_the_lots_that_were_open() -> None:
    """10 at 100, split by 2, 10 at 300, split by 3, 10 at 60; after that 130 are taken of 60 + 30 + 10 … by lot."""
    rows = [("BUY", 10, 100), ("SPLIT", 2, 0), ("BUY", 10, 300), ("SPLIT", 3, 0), ("BUY", 10, 60)]
    entries = costing.run(CostState(), 0, trades(*rows), "FIFO")
    state = entries[-1].state
    assert state.head == Lot(1, *figures(60, 100))
    lots = [entry.opened for entry in entries[1:] if entry.opened]
    splits = [Split(entry.sequence, entry.split) for entry in entries[1:] if entry.split is not None]
    # The second split multiplies the second lot only; the first one, made before it, neither.
    sold = costing.run(state, 5, trades(("SELL", 75, 0), ("SELL", 20, 0)), "FIFO", lots, splits)
    assert [entry.state.cost_basis for entry in sold] == list(figures(460 - 100 - 150, 460 - 100 - 300 - 30))
    assert [entry.state.head for entry in sold] == [Lot(3, *figures(15, 150)), Lot(5, *figures(5, 30))]


def test_a_split_in_between_reaches_the_head_and_the_lots_that_wait() -> None:
    state = costing.run(CostState(), 0, trades(*_THREE), "FIFO")[-1].state
    lots = [Lot(2, *figures(10, 200)), Lot(3, *figures(10, 300))]
    entries = costing.run(state, 3, trades(("SPLIT", 2, 0), ("SELL", 30, 0)), "FIFO", lots)
    assert entries[0].state.head == Lot(1, *figures(20, 100))
    assert entries[1].state.head == Lot(2, *figures(10, 100))
    assert entries[1].state.realized == -200
