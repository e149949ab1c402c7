"""Cost of positions (semantics, Positions): the examples, the careful cases, and properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinks import costing
from sinks.costing import CostState, LotsMissing
from sinks.model import CostBasisMethod, Transaction
from tidemark.oracle import Transaction as OracleTransaction
from tidemark.oracle import compute_books

START = datetime(2025, 9, 1, tzinfo=UTC)
TENTH = Decimal("1e-10")
"""The smallest quantity there is."""


def trades(*rows: tuple[Any, ...]) -> list[Transaction]:
    """(type, quantity, amount[, fee]) one day apart."""
    return [
        Transaction(
            f"T{n:03d}",
            "P",
            "S",
            START + timedelta(days=n),
            kind,
            Decimal(quantity),
            Decimal(0),
            Decimal(amount),
            Decimal(rest[0] if rest else 0),
        )
        for n, (kind, quantity, amount, *rest) in enumerate(rows)
    ]


def after(method: CostBasisMethod, *rows: tuple[Any, ...]) -> tuple[Decimal, Decimal, Decimal]:
    state = costing.run(CostState(), 0, trades(*rows), method)[-1].state
    return state.quantity, state.cost_basis, state.realized


def figures(*values: Any) -> tuple[Decimal, ...]:
    return tuple(Decimal(value) for value in values)


@pytest.mark.parametrize(
    ("method", "rows", "expected"),
    [
        ("FIFO", [("BUY", 100, 20000), ("SELL", 40, 8600), ("BUY", 50, 11000)], (110, 23000, 600)),
        (
            "FIFO",
            [("BUY", 100, 1000), ("SELL", 20, 220), ("SELL", 30, 345), ("BUY", 50, 600)],
            (100, 1100, 65),
        ),
        ("FIFO", [("BUY", 100, 1000), ("BUY", 100, 1200), ("SELL", 50, 750)], (150, 1700, 250)),
        ("AVCO", [("BUY", 100, 1000), ("BUY", 100, 1200), ("SELL", 50, 750)], (150, 1650, 200)),
        ("FIFO", [("SELL", 10, 100, 1)], (-10, -99, 0)),
        ("FIFO", [("SELL", 10, 100, 1), ("BUY", 4, 20, 1)], (-6, "-59.4", "18.6")),
        ("FIFO", [("BUY", 10, 100), ("SELL", 15, 180, 3)], (-5, -59, 18)),
        ("FIFO", [("SELL", 5, 50), ("BUY", 15, 90, 6)], (10, 64, 18)),
        ("FIFO", [("BUY", 10, 100), ("TRANSFER_OUT", 15, 0)], (-5, 0, 0)),
        ("FIFO", [("SELL", 5, 50), ("TRANSFER_IN", 15, 90)], (10, 60, 0)),
        ("FIFO", [("BUY", 10, 100), ("SPLIT", 3, 0), ("SELL", 15, 75)], (15, 50, 25)),
        ("AVCO", [("SELL", 10, 100), ("SELL", 10, 200), ("BUY", 10, 50)], (-10, -150, 100)),
        ("FIFO", [("BUY", 3, 100), ("SELL", 1, 0), ("SELL", 1, 0), ("SELL", 1, 0)], (0, 0, -100)),
        (
            "FIFO",
            [("BUY", 10, 100), ("DIVIDEND", 10, 5), ("FEE", 0, 3), ("TAX", 0, 1), ("INTEREST", 0, 2)],
            (10, 100, 0),
        ),
    ],
)
def test_figures_by_hand(method: CostBasisMethod, rows: list[tuple[Any, ...]], expected: tuple[Any, ...]) -> None:
    assert tuple(costing.rounded(v) for v in after(method, *rows)) == figures(*expected)


KINDS = ["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT"]
amounts = st.decimals(0, 10_000, places=2)
quantities = st.one_of(st.just(0), st.decimals("0.01", 1_000, places=2), st.integers(1, 9).map(lambda n: n * TENTH))
ratios = st.sampled_from(["2", "3", "0.5", "0.3333333333", "0.0000000004", "999999999999999999", "0.1428571429"])
random_rows = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KINDS), quantities, amounts, amounts),
        st.tuples(st.sampled_from(KINDS), quantities, amounts, amounts),
        st.tuples(st.sampled_from(["BUY", "TRANSFER_IN"]), st.just(0), amounts, amounts),
        st.tuples(st.just("SPLIT"), ratios, st.just(0)),
        st.tuples(st.just("DIVIDEND"), quantities, amounts),
    ),
    max_size=25,
)


@given(random_rows, st.sampled_from(["FIFO", "AVCO"]))
def test_the_oracle_agrees_after_every_transaction(rows: list[tuple[Any, ...]], method: CostBasisMethod) -> None:
    history = trades(*rows)
    oracle = compute_books(
        [
            OracleTransaction(
                t.transaction_id,
                t.portfolio_id,
                t.security_id,
                t.transaction_date,
                t.transaction_type,
                t.quantity,
                t.gross_transaction_amount,
                t.trade_fee,
            )
            for t in history
        ],
        [],
        [],
        method,
    )
    rows_of_oracle = oracle.history.get(("P", "S"), ())
    entries = costing.run(CostState(), 0, history, method)
    assert len(rows_of_oracle) == len(entries)
    for entry, expected in zip(entries, rows_of_oracle, strict=True):
        state = entry.state
        found = tuple(costing.rounded(v) for v in (state.quantity, state.cost_basis, state.realized))
        assert found == (expected.quantity, expected.cost_basis, expected.realized_gain_loss)
        assert entry.out_of_range == expected.out_of_range


@given(random_rows)
def test_all_lots_have_one_sign(rows: list[tuple[Any, ...]]) -> None:
    for entry in costing.run(CostState(), 0, trades(*rows), "FIFO"):
        if entry.opened:
            assert entry.opened.quantity * entry.state.quantity >= 0
        for lot in entry.restated:
            assert lot.quantity * entry.state.quantity > 0
        if entry.state.head:
            assert entry.state.head.quantity * entry.state.quantity >= 0
        assert (entry.state.head is None) == (entry.state.quantity == 0)


def test_a_history_of_another_method_is_refused() -> None:
    average = costing.run(CostState(), 0, trades(("BUY", 10, 100), ("BUY", 10, 200)), "AVCO")[-1].state
    with pytest.raises(LotsMissing):
        costing.run(average, 2, trades(("SELL", 5, 100)), "FIFO")


def test_the_error_of_a_division_does_not_decide_a_tie() -> None:
    """A quarter of the cost is realized in two shares of a seventh, which are cut off: 1.5 of the smallest unit."""
    rows = [("BUY", 7, "6e-10"), ("SELL", 1, 0), ("SELL", "0.75", 0)]
    assert costing.rounded(after("FIFO", *rows)[2]) == Decimal("-2e-10")
