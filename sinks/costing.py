"""Cost of a position: pure state machine over a key's transactions (semantics, Positions).

A state is never rounded; `rounded` is applied to what is stored. Under FIFO lots are consumed oldest first, so a state
needs only totals and what is left of the oldest open lot, the head: the open lots after it are those that later
transactions opened, as they opened them. Under AVCO the totals are all there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

from sinks.model import CostBasisMethod, Transaction

ZERO = Decimal(0)
_ONE = Decimal(1)
_PLACES = Decimal("1e-10")
_GUARD = Decimal("1e-30")
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)  # semantics asks for at least 28 digits
_WIDE = Context(prec=5_000, rounding=ROUND_HALF_EVEN)  # for splits upon splits


class LotsMissing(Exception):  # noqa: N818 - says what is wrong
    """Fewer lots are stored than the quantity says: the history was written under another cost basis method."""


@dataclass(frozen=True, slots=True)
class Lot:
    """A parcel and its cost; both negative for a short one (cost: minus the proceeds). sequence: who opened it."""

    sequence: int
    quantity: Decimal
    cost: Decimal


@dataclass(frozen=True, slots=True)
class Split:
    """A split at a place in the history: it multiplies every lot opened before."""

    sequence: int
    ratio: Decimal


@dataclass(frozen=True, slots=True)
class CostState:
    """Totals after a transaction, and what is left of the oldest open lot (None under AVCO, or when nothing is held).

    quantity is negative when short; cost_basis is exactly zero when quantity is; realized since the key began.
    """

    quantity: Decimal = ZERO
    cost_basis: Decimal = ZERO
    realized: Decimal = ZERO
    head: Lot | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of history: the state after its transaction, and the lot that it opened."""

    sequence: int
    transaction: Transaction
    state: CostState
    opened: Lot | None = None

    @property
    def split(self) -> Decimal | None:
        """The ratio of a split."""
        return self.transaction.quantity if self.transaction.transaction_type == "SPLIT" else None


def rounded(value: Decimal) -> Decimal:
    """As stored: half-even to 10 decimal places.

    A share such as 1/7 leaves an error in the 60th digit, which must not decide a tie: it is rounded away first.
    """
    return value.quantize(_GUARD, context=_WIDE).quantize(_PLACES, context=_WIDE)


def run(
    state: CostState,
    kept: int,
    transactions: Iterable[Transaction],
    method: CostBasisMethod,
    lots: Sequence[Lot] = (),
    splits: Sequence[Split] = (),
) -> list[Entry]:
    """The entries that the transactions make after the first `kept` ones, whose state is given.

    lots and splits: what `units_needed` asks for, from after the head up to `kept`, in order. Raises LotsMissing.
    """
    with localcontext(_EXACT):
        position = _Position(state, method, lots, splits)
        return [position.apply(sequence, t) for sequence, t in enumerate(transactions, kept + 1)]


def units_needed(state: CostState, transactions: Iterable[Transaction]) -> Decimal:
    """How many units, as they are counted at the state, the transactions will take off the lots behind its head.

    Nothing is needed for a disposal of all that is held: the totals know what it cost.
    """
    if state.head is None:
        return ZERO
    with localcontext(_EXACT):
        held, split, taken = state.quantity, _ONE, ZERO
        for t in transactions:
            change = _DIRECTION.get(t.transaction_type)
            if change is None:
                if t.transaction_type == "SPLIT":
                    held, split = held * t.quantity, split * t.quantity
                continue
            if held * change < 0:
                if t.quantity >= abs(held):
                    break
                taken += t.quantity / split
            held += change * t.quantity
        return max(ZERO, min(taken, abs(state.quantity)) - abs(state.head.quantity))


_DIRECTION = {"BUY": 1, "TRANSFER_IN": 1, "SELL": -1, "TRANSFER_OUT": -1}


class _Position:
    """One run through the transactions of a key. Lots wait as they were opened; the head is kept up to date."""

    def __init__(self, state: CostState, method: CostBasisMethod, lots: Iterable[Lot], splits: Iterable[Split]) -> None:
        self.quantity, self.cost, self.realized = state.quantity, state.cost_basis, state.realized
        self.head = state.head
        self._by_lot = method == "FIFO"
        self._waiting = deque(lots)
        self._splits = list(splits)
        self._effects: dict[str, Callable[[int, Transaction], Lot | None]] = {
            "BUY": self._buy,
            "SELL": self._sell,
            "TRANSFER_IN": self._transfer_in,
            "TRANSFER_OUT": self._transfer_out,
            "SPLIT": self._split,
        }

    def apply(self, sequence: int, t: Transaction) -> Entry:
        """The table in semantics, Positions; DIVIDEND, INTEREST, FEE and TAX change nothing."""
        effect = self._effects.get(t.transaction_type)
        opened = effect(sequence, t) if effect else None
        return Entry(sequence, t, CostState(self.quantity, self.cost, self.realized, self.head), opened)

    def _buy(self, sequence: int, t: Transaction) -> Lot | None:
        spent = t.gross_transaction_amount + t.trade_fee
        closed, proceeds = self._close(t.quantity, sign=-1)
        paid = _share(spent, closed, t.quantity)
        self.realized -= proceeds + paid
        return self._open(sequence, t.quantity - closed, spent - paid)

    def _sell(self, sequence: int, t: Transaction) -> Lot | None:
        received = t.gross_transaction_amount - t.trade_fee
        closed, cost = self._close(t.quantity, sign=1)
        excess = t.quantity - closed
        short = _share(received, excess, t.quantity)
        self.realized += received - short - cost
        return self._open(sequence, -excess, -short) if excess else None

    def _transfer_in(self, sequence: int, t: Transaction) -> Lot | None:
        closed, _ = self._close(t.quantity, sign=-1)
        amount = t.gross_transaction_amount
        return self._open(sequence, t.quantity - closed, amount - _share(amount, closed, t.quantity))

    def _transfer_out(self, sequence: int, t: Transaction) -> Lot | None:
        closed, _ = self._close(t.quantity, sign=1)
        excess = t.quantity - closed
        return self._open(sequence, -excess, ZERO) if excess else None

    def _split(self, sequence: int, t: Transaction) -> None:
        self.quantity *= t.quantity
        self._splits.append(Split(sequence, t.quantity))
        if self.head:
            self.head = Lot(self.head.sequence, self.head.quantity * t.quantity, self.head.cost)

    def _open(self, sequence: int, quantity: Decimal, cost: Decimal) -> Lot | None:
        if quantity == 0 and (cost == 0 or self.quantity == 0):
            return None
        self.quantity += quantity
        self.cost += cost
        if not self._by_lot:
            return None
        lot = Lot(sequence, quantity, cost)
        if self.head is None:
            self.head = lot
        else:
            self._waiting.append(lot)
        return lot

    def _close(self, wanted: Decimal, sign: int) -> tuple[Decimal, Decimal]:
        """Take up to `wanted` units of the sign off the position: (units closed, their cost)."""
        held, cost = self.quantity * sign, self.cost
        if wanted == 0 or held <= 0:
            return ZERO, ZERO
        if wanted >= held:
            self.quantity = self.cost = ZERO
            self.head = None
            self._waiting.clear()
            return held, cost
        part = self._take(wanted, sign) if self._by_lot else cost * wanted / held
        self.quantity -= wanted * sign
        self.cost -= part
        return wanted, part

    def _take(self, wanted: Decimal, sign: int) -> Decimal:
        """Less than all that is held, off the oldest lots; returns its cost. A used-up head stays as a place."""
        left, cost, lot = wanted, ZERO, self.head
        while lot is not None:
            size = lot.quantity * sign
            if size > left:
                part = lot.cost * left / size
                self.head = Lot(lot.sequence, lot.quantity - left * sign, lot.cost - part)
                return cost + part
            left -= size
            cost += lot.cost
            self.head = Lot(lot.sequence, ZERO, ZERO)
            if left == 0:
                return cost
            lot = self._next_lot()
        if left > wanted * _GUARD:  # less is what splits leave in the last digits
            raise LotsMissing(f"{left} of {wanted} units have no lot")
        return cost

    def _next_lot(self) -> Lot | None:
        if not self._waiting:
            return None
        lot = self._waiting.popleft()
        while self._splits and self._splits[0].sequence < lot.sequence:
            self._splits.pop(0)  # concerns neither this lot nor any after it
        quantity = lot.quantity
        for split in self._splits:
            quantity *= split.ratio
        return Lot(lot.sequence, quantity, lot.cost)


def _share(amount: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    if part == whole:
        return amount if whole else ZERO
    return amount * part / whole
