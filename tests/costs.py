"""The engine's costing for tests: what stands after each of a key's transactions."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from sinks import costing
from sinks.costing import CostState
from sinks.model import CostBasisMethod, Transaction

Figures = tuple[Decimal, Decimal, Decimal]


def costs(transactions: Iterable[Transaction], method: CostBasisMethod) -> list[Figures]:
    """(quantity, cost_basis, realized_gain_loss) as stored, after each transaction in the order given."""
    state, rows = CostState(), []
    for transaction in transactions:
        state = costing.apply(state, transaction, method)
        rows.append(
            (costing.rounded(state.quantity), costing.rounded(state.cost_basis), costing.rounded(state.realized))
        )
    return rows
