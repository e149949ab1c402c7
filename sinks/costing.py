"""Cost of a position, lot by lot: pure functions on immutable states (semantics, Positions).

A state is never rounded; `rounded` is applied to what is stored. Under AVCO a position is one lot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import reduce

from sinks.model import CostBasisMethod, Transaction

ZERO = Decimal(0)
_PLACES = Decimal("1e-10")
_GUARD = Decimal("1e-30")
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)  # semantics asks for at least 28 digits
_WIDE = Context(prec=5_000, rounding=ROUND_HALF_EVEN)  # for splits upon splits


@dataclass(frozen=True, slots=True)
class Lot:
    """A parcel with its cost; both negative for a short one (cost: minus the proceeds)."""

    quantity: Decimal
    cost: Decimal


@dataclass(frozen=True, slots=True)
class CostState:
    """Open lots, oldest first, all of one sign; realized gains since the key began."""

    lots: tuple[Lot, ...] = ()
    realized: Decimal = ZERO

    @property
    def quantity(self) -> Decimal:
        """Units held; negative when short."""
        return reduce(_EXACT.add, (lot.quantity for lot in self.lots), ZERO)

    @property
    def cost_basis(self) -> Decimal:
        """Cost of what is held; exactly zero when nothing is."""
        return reduce(_EXACT.add, (lot.cost for lot in self.lots), ZERO)


def rounded(value: Decimal) -> Decimal:
    """As stored: half-even to 10 decimal places.

    A share such as 1/7 leaves an error in the 60th digit, which must not decide a tie: it is rounded away first.
    """
    return value.quantize(_GUARD, context=_WIDE).quantize(_PLACES, context=_WIDE)


def apply(state: CostState, transaction: Transaction, method: CostBasisMethod) -> CostState:
    """The state after the transaction (the table in semantics, Positions)."""
    effect = _EFFECTS.get(transaction.transaction_type)
    if effect is None:  # DIVIDEND, INTEREST, FEE, TAX
        return state
    with localcontext(_EXACT):
        return _normal(effect(state, transaction), method)


def encode_lots(state: CostState) -> str:
    """The lots as a JSON array of [quantity, cost] in decimal text."""
    return json.dumps([[str(lot.quantity), str(lot.cost)] for lot in state.lots])


def decode(lots: str, realized: str) -> CostState:
    """The state that was stored."""
    return CostState(tuple(Lot(Decimal(q), Decimal(c)) for q, c in json.loads(lots)), Decimal(realized))


def _buy(state: CostState, t: Transaction) -> CostState:
    spent = t.gross_transaction_amount + t.trade_fee
    closed, proceeds, state = _close(state, t.quantity, sign=-1)
    paid = _share(spent, closed, t.quantity)
    state = replace(state, realized=state.realized + (-proceeds - paid if closed else ZERO))
    return _open(state, t.quantity - closed, spent - paid)


def _sell(state: CostState, t: Transaction) -> CostState:
    received = t.gross_transaction_amount - t.trade_fee
    closed, cost, state = _close(state, t.quantity, sign=1)
    excess = t.quantity - closed
    short = _share(received, excess, t.quantity)
    state = replace(state, realized=state.realized + received - short - cost)
    return _open(state, -excess, -short) if excess else state


def _transfer_in(state: CostState, t: Transaction) -> CostState:
    closed, _, state = _close(state, t.quantity, sign=-1)
    amount = t.gross_transaction_amount
    return _open(state, t.quantity - closed, amount - _share(amount, closed, t.quantity))


def _transfer_out(state: CostState, t: Transaction) -> CostState:
    closed, _, state = _close(state, t.quantity, sign=1)
    excess = t.quantity - closed
    return _open(state, -excess, ZERO) if excess else state


def _split(state: CostState, t: Transaction) -> CostState:
    return replace(state, lots=tuple(Lot(lot.quantity * t.quantity, lot.cost) for lot in state.lots))


_EFFECTS: dict[str, Callable[[CostState, Transaction], CostState]] = {
    "BUY": _buy,
    "SELL": _sell,
    "TRANSFER_IN": _transfer_in,
    "TRANSFER_OUT": _transfer_out,
    "SPLIT": _split,
}


def _share(amount: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    if part == whole:
        return amount if whole else ZERO
    return amount * part / whole


def _open(state: CostState, quantity: Decimal, cost: Decimal) -> CostState:
    if quantity == 0 and (cost == 0 or not state.lots):
        return state
    return replace(state, lots=(*state.lots, Lot(quantity, cost)))


def _close(state: CostState, wanted: Decimal, sign: int) -> tuple[Decimal, Decimal, CostState]:
    """Take up to `wanted` units off the oldest lots of the sign: (units closed, their cost, what is left)."""
    if wanted == 0 or state.quantity * sign <= 0:
        return ZERO, ZERO, state
    left, cost = wanted, ZERO
    for place, lot in enumerate(state.lots):
        size = lot.quantity * sign
        if size > left:
            part = lot.cost * left / size
            rest = Lot(lot.quantity - left * sign, lot.cost - part)
            return wanted, cost + part, replace(state, lots=(rest, *state.lots[place + 1 :]))
        left -= size
        cost += lot.cost
    return wanted - left, cost, replace(state, lots=())


def _normal(state: CostState, method: CostBasisMethod) -> CostState:
    if state.quantity == 0:
        return replace(state, lots=())
    if method == "AVCO" and len(state.lots) > 1:
        return replace(state, lots=(Lot(state.quantity, state.cost_basis),))
    return state
