"""The engine's costing for tests: what stands after each of a key's transactions, and what its store gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal

from sinks import costing
from sinks.costing import CostState, Entry, Lot
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


def in_parts(transactions: Sequence[Transaction], places: Iterable[int], method: CostBasisMethod) -> list[Entry]:
    """The entries where batches end at the places: each goes on from what is stored, with the lots it asks for."""
    entries: list[Entry] = []
    for end in (*sorted(places), len(transactions)):
        state = entries[-1].state if entries else CostState()
        rest = transactions[len(entries) : end]
        lots = stored_lots(entries, costing.units_needed(state, rest)) if entries else []
        entries += costing.run(state, len(entries), rest, method, lots)
    return entries


def stored_lots(entries: Sequence[Entry], units: Decimal) -> list[Lot]:
    """What a store of the entries gives for as many units behind the last one's head, and not a lot more."""
    head = entries[-1].state.head
    if head is None:
        return []
    behind: list[Lot] = []
    for entry in entries:
        if entry.sequence <= head.sequence:
            continue
        if entry.restated:
            behind = [lot for lot in entry.restated if lot.sequence > head.sequence]
        elif entry.opened and entry.opened.quantity:
            behind.append(entry.opened)
        elif entry.opened:
            newest = behind.pop()
            behind.append(Lot(entry.sequence, newest.quantity, newest.cost + entry.opened.cost))
    read: list[Lot] = []
    for lot in behind:
        if units <= 0:
            break
        read.append(lot)
        units = costing._WIDE.subtract(units, lot.quantity.copy_abs())  # abs() would round to 28 digits
    return read
