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
    return [
        (
            costing.rounded(entry.state.quantity),
            costing.rounded(entry.state.cost_basis),
            costing.rounded(entry.state.realized),
        )
        for entry in costing.run(CostState(), 0, transactions, method)
    ]
