"""Books never depend on how records were batched, nor on digits below the tenth place; and they are those of fractions.

The law of docs/positions.md (The arithmetic) is here a third time, in fractions, which round nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from math import gcd
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sinks import costing
from sinks.costing import CostState
from sinks.model import CostBasisMethod, Transaction
from tests.costs import Figures, costs, in_parts
from tests.unit.test_arithmetic import by_the_oracle
from tests.unit.test_costing import TENTH, random_rows, trades

METHODS: tuple[CostBasisMethod, ...] = ("FIFO", "AVCO")
ENGINES = pytest.mark.parametrize("engine", [costs, by_the_oracle], ids=["engine", "oracle"])
methods = st.sampled_from(METHODS)


def round10(value: Fraction) -> Fraction:
    """Half-even: as Python rounds a fraction."""
    return Fraction(round(value * 10**10), 10**10)


class Exact:
    """A key in fractions; at average cost there is one lot."""

    def __init__(self, method: CostBasisMethod) -> None:
        self.method = method
        self.lots: list[tuple[Fraction, Fraction]] = []
        self.realized = Fraction(0)

    @property
    def quantity(self) -> Fraction:
        return sum((quantity for quantity, _ in self.lots), Fraction(0))

    def apply(self, t: Transaction) -> Figures:
        """What is stored after the transaction."""
        sign = {"BUY": 1, "TRANSFER_IN": 1, "SELL": -1, "TRANSFER_OUT": -1}.get(t.transaction_type, 0)
        ratio = Fraction(t.quantity) if t.transaction_type == "SPLIT" else None
        after = round10(self.quantity * ratio) if ratio else self.quantity + sign * Fraction(t.quantity)
        if abs(after) < 10**30:
            if ratio:
                self.split(ratio)
            elif sign:
                self.trade(t, sign)
        cost = sum((cost for _, cost in self.lots), Fraction(0))
        quantity, cost, realized = (round10(value) * 10**10 for value in (self.quantity, cost, self.realized))
        return scaled(quantity), scaled(cost), scaled(realized)

    def trade(self, t: Transaction, sign: int) -> None:
        is_transfer = t.transaction_type.startswith("TRANSFER")
        units, amount = Fraction(t.quantity), Fraction(t.gross_transaction_amount)
        if not is_transfer:
            amount += sign * Fraction(t.trade_fee)
        elif sign < 0:
            amount = Fraction(0)
        if not units:
            if sign < 0:
                self.realized += amount
            elif self.lots:
                self.lots[-1] = (self.lots[-1][0], self.lots[-1][1] + amount)
            return
        left = units
        while left and self.lots and self.lots[0][0] * sign < 0:
            quantity, cost = self.lots[0]
            closed = min(abs(quantity), left)
            relieved = cost * closed / abs(quantity)
            if not is_transfer:
                self.realized -= sign * amount * closed / units + relieved
            left -= closed
            rest = (quantity + sign * closed, cost - relieved)
            self.lots[:1] = [rest] if rest[0] else []
        if left:
            self.lots.append((sign * left, sign * amount * left / units))
            if self.method == "AVCO":
                self.lots = [(self.quantity, sum((cost for _, cost in self.lots), Fraction(0)))]

    def split(self, ratio: Fraction) -> None:
        lots: list[tuple[Fraction, Fraction]] = []
        before, after, cost = Fraction(0), Fraction(0), Fraction(0)
        for quantity, of_lot in self.lots:
            before, cost = before + quantity, cost + of_lot
            if upto := round10(before * ratio) - after:
                lots.append((upto, cost))
                after, cost = after + upto, Fraction(0)
        if lots:
            lots[-1] = (lots[-1][0], lots[-1][1] + cost)
        else:
            self.realized -= cost
        self.lots = lots


def scaled(value: Fraction) -> Decimal:
    """A whole number of tenth places."""
    assert value.denominator == 1
    return Decimal(value.numerator).scaleb(-10, costing._WIDE)


def by_fractions(transactions: Sequence[Transaction], method: CostBasisMethod) -> list[Figures]:
    key = Exact(method)
    return [key.apply(t) for t in transactions]


@given(random_rows)
def test_every_way_to_cut_a_history_into_batches_makes_the_same_rows(rows: list[tuple[Any, ...]]) -> None:
    history = trades(*rows)
    for method in METHODS:
        straight = costing.run(CostState(), 0, history, method)
        for place in range(len(history) + 1):
            assert in_parts(history, [place], method) == straight
        assert in_parts(history, range(1, len(history)), method) == straight


@given(random_rows, st.sets(st.integers(0, 25)), methods)
def test_cut_at_several_places(rows: list[tuple[Any, ...]], places: set[int], method: CostBasisMethod) -> None:
    history = trades(*rows)
    cuts = [min(place, len(history)) for place in places]
    assert in_parts(history, cuts, method) == costing.run(CostState(), 0, history, method)


@ENGINES
@given(rows=random_rows, method=methods)
def test_the_books_are_those_of_fractions(engine: Any, rows: list[tuple[Any, ...]], method: CostBasisMethod) -> None:
    history = trades(*rows)
    assert engine(history, method) == by_fractions(history, method)


@ENGINES
@given(
    units=st.integers(2, 5 * 10**27).map(lambda n: 2 * n + 1),
    sold=st.integers(1, 10**28),
    above=st.booleans(),
    method=methods,
)
def test_what_is_nearly_a_tie_is_none(engine: Any, units: int, sold: int, above: bool, method: CostBasisMethod) -> None:
    """Of the smallest units: cost x sold / units is (2n + 1) / 2, and one of 2 x units more or less."""
    sold = sold % (units - 1) + 1
    assume(gcd(sold, units) == 1)
    cost = (units + (1 if above else -1)) // 2 * pow(sold, -1, units) % units
    with costing.localcontext(costing._EXACT):
        history = trades(("BUY", units * TENTH, cost * TENTH), ("SELL", sold * TENTH, 0))
    assert engine(history, method) == by_fractions(history, method)
    relieved = cost * sold // units + above
    assert engine(history, method)[-1][2] == -Decimal(relieved).scaleb(-10, costing._WIDE)


@ENGINES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # What the books show can be sold, and nothing is left.
        ([("BUY", "1.1", 110), ("SPLIT", "0.3333333333", 0)], ("0.3666666666", 110, 0)),
        ([("BUY", "1.1", 110), ("SPLIT", "0.3333333333", 0), ("SELL", "0.3666666666", 110)], (0, 0, 0)),
        # Less than half of the tenth place is nothing: the cost is realized.
        ([("BUY", "1e-10", 100), ("SPLIT", "0.3333333333", 0)], (0, 0, -100)),
        ([("SELL", "1e-10", 100), ("SPLIT", "0.3333333333", 0)], (0, 0, 100)),
        # The total is the same, whatever the lots are.
        ([*[("BUY", "1e-10", 1)] * 3, ("SPLIT", "0.5", 0)], ("2e-10", 3, 0)),
        ([*[("BUY", 100, 1)] * 3, ("SPLIT", "0.3333333333", 0)], ("99.9999999900", 3, 0)),
        ([("BUY", 119, 7), ("SPLIT", "0.5", 0), ("SPLIT", 2, 0)], (119, 7, 0)),
        # No lots without units.
        ([("BUY", 0, 7, 1), ("BUY", 10, 100)], (10, 100, 0)),
        ([("BUY", 10, 100), ("TRANSFER_IN", 0, 7), ("SELL", 10, 200)], (0, 0, 93)),
        ([("BUY", 10, 100), ("SELL", 0, 9, 2)], (10, 100, 7)),
        # 10^30 is too much; what follows goes on from what was.
        ([("BUY", 2, 9), ("SPLIT", "999999999999999999", 0), ("SPLIT", "6e11", 0)], ("1999999999999999998", 9, 0)),
        ([("BUY", 1, 9), ("SPLIT", "1e17", 0), ("SPLIT", "1e13", 0), ("SELL", "1e17", 10)], (0, 0, 1)),
        ([("SELL", 1, 9), ("SPLIT", "1e17", 0), ("SPLIT", "1e13", 0), ("BUY", "1e17", 10)], (0, 0, -1)),
    ],
)
def test_examples(engine: Any, rows: list[Any], expected: Any, method: CostBasisMethod) -> None:
    history = trades(*rows)
    assert engine(history, method)[-1] == tuple(map(Decimal, expected))
    assert by_fractions(history, method)[-1] == tuple(map(Decimal, expected))


@pytest.mark.parametrize("places", [[], [2], [3], [1, 2, 3]])
def test_a_cost_without_units_between_two_lots(places: list[int]) -> None:
    """BUY 10 for 100, 7 without units, BUY 10 for 100, SELL 15 for 180: the 7 belong to the first lot."""
    rows = [("BUY", 10, 100), ("TRANSFER_IN", 0, 7), ("BUY", 10, 100), ("SELL", 15, 180)]
    state = in_parts(trades(*rows), places, "FIFO")[-1].state
    assert (state.cost_basis, state.realized) == (50, 180 - 157)


def test_out_of_range_is_decided_by_the_quantity_alone() -> None:
    rows = [("BUY", 5, 1), *[("SPLIT", "999999999999999999", 0)] * 300, ("SELL", 5, "999999999999999999")]
    for method in METHODS:
        entries = costing.run(CostState(), 0, trades(*rows), method)
        assert [entry.sequence for entry in entries if entry.out_of_range] == list(range(3, 302))
        assert {entry.state for entry in entries[1:301]} == {entries[1].state}
        assert entries[-1].state.quantity == 5 * Decimal("999999999999999999") - 5
    edge = trades(("BUY", "999999999999999999.9999999999", 0), ("SPLIT", "1e12", 0), ("BUY", "100", 0))
    assert [entry.out_of_range for entry in costing.run(CostState(), 0, edge, "FIFO")] == [False, False, True]


@given(random_rows, methods)
def test_sums_and_products_are_exact(rows: list[tuple[Any, ...]], method: CostBasisMethod) -> None:
    """The context is wide enough: wherever a share is not cut off, nothing else is rounded either."""
    for entry in costing.run(CostState(), 0, trades(*rows), method):
        for value in (entry.state.quantity, *(lot.quantity for lot in [entry.state.head] if lot)):
            assert value == value.quantize(TENTH, context=costing._WIDE)
        for value in (entry.state.cost_basis, entry.state.realized):
            assert value == value.quantize(costing._CUT, context=costing._WIDE)
