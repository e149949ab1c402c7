"""Cost of a position: pure state machine over a key's transactions (docs/positions.md, The arithmetic).

Quantities are exact and have at most 10 decimal places. Costs are exact, except that shares of a cost or an amount are
cut off behind the 60th decimal place. `rounded` is applied to what is stored.

Under FIFO lots are consumed oldest first. A state therefore needs totals and what is left of the oldest open lot, the
head. The open lots behind the head are those that later transactions opened, as they opened them; a split states all
of them anew. Under AVCO the totals are all there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context, Decimal, localcontext

from sinks.model import CostBasisMethod, Transaction

ZERO = Decimal(0)
OUT_OF_RANGE = Decimal("1e30")
"""No quantity reaches this in absolute value: a transaction that would take it there leaves the state as it is."""

_PLACES = Decimal("1e-10")
_GUARD = Decimal("1e-50")
_CUT = Decimal("1e-60")
_UNREAD = 0
# A cost has at most 46 digits before the point and 60 behind it, a quantity 40 in all: their product has 146 digits.
_EXACT = Context(prec=200, rounding=ROUND_DOWN)
_WIDE = Context(prec=200, rounding=ROUND_HALF_EVEN)


class LotsMissing(Exception):  # noqa: N818 - says what is wrong
    """Fewer lots are stored than the quantity says: the history was written under another cost basis method."""


@dataclass(frozen=True, slots=True)
class Lot:
    """A parcel and its cost; both are negative for a short one, whose cost is minus the proceeds.

    sequence: the last row that put something into it. An opened lot without units adds its cost to the newest open lot.
    """

    sequence: int
    quantity: Decimal
    cost: Decimal


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
    """A row of history: the state after its transaction, and the lot that it opened.

    restated: the lots behind the head as a split leaves them; they take the place of all that were opened before.
    """

    sequence: int
    transaction: Transaction
    state: CostState
    opened: Lot | None = None
    restated: Sequence[Lot] = ()
    out_of_range: bool = False


def rounded(value: Decimal) -> Decimal:
    """As stored: half-even to 10 decimal places.

    Cut-off shares leave an error behind the 50th place, which must not decide a tie: it is rounded away first.
    """
    return value.quantize(_GUARD, context=_WIDE).quantize(_PLACES, context=_WIDE)


def run(
    state: CostState,
    kept: int,
    transactions: Iterable[Transaction],
    method: CostBasisMethod,
    lots: Iterable[Lot] = (),
) -> list[Entry]:
    """The entries that the transactions make after the first `kept` ones, whose state is given.

    lots: as many of those behind the head as `units_needed` asks for, oldest first. Raises LotsMissing.
    """
    with localcontext(_EXACT):
        position = _Position(state, method, lots)
        return [position.apply(sequence, t) for sequence, t in enumerate(transactions, kept + 1)]


def units_needed(state: CostState, transactions: Iterable[Transaction]) -> Decimal:
    """How many units the transactions need of the lots behind the state's head, oldest first.

    A disposal of all that is held needs none, since the totals know what it cost. A split needs every open lot.
    """
    if state.head is None:
        return ZERO
    with localcontext(_EXACT):
        held, taken = state.quantity, ZERO
        for t in transactions:
            after = _quantity_after(held, t)
            if abs(after) >= OUT_OF_RANGE:
                continue
            if after * held <= 0:
                break
            if t.transaction_type == "SPLIT":
                taken = abs(state.quantity)
                break
            taken += max(ZERO, abs(held) - abs(after))
            held = after
        return max(ZERO, min(taken, abs(state.quantity)) - abs(state.head.quantity))


_DIRECTION = {"BUY": 1, "TRANSFER_IN": 1, "SELL": -1, "TRANSFER_OUT": -1}


def _quantity_after(held: Decimal, t: Transaction) -> Decimal:
    """The quantity decides by itself, whatever the costs and the method."""
    if t.transaction_type == "SPLIT":
        return (held * t.quantity).quantize(_PLACES, context=_WIDE)
    return held + _DIRECTION.get(t.transaction_type, 0) * t.quantity


def _share(amount: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    """The part's share of an amount; not negative, at most the whole. A quotient is cut off behind the 60th place."""
    if part == whole:
        return amount
    if part == 0:
        return ZERO
    share = amount * part / whole
    cut = share.quantize(_CUT)
    return share if share == cut else cut


class _Position:
    """One run through the transactions of a key. Lots wait behind the head, oldest first."""

    def __init__(self, state: CostState, method: CostBasisMethod, lots: Iterable[Lot]) -> None:
        self.quantity, self.cost, self.realized = state.quantity, state.cost_basis, state.realized
        self.head = state.head
        self._by_lot = method == "FIFO"
        self._waiting = deque(lots)
        # The lots that nobody needs stand as one, so that what comes later lies behind them. It must not be reached.
        unread = self.quantity - sum((lot.quantity for lot in self._waiting), self.head.quantity if self.head else ZERO)
        if self._by_lot and unread:
            self._waiting.append(Lot(_UNREAD, unread, ZERO))
        self._effects: dict[str, Callable[[int, Transaction], Lot | None]] = {
            "BUY": lambda n, t: self._add(n, t.quantity, t.gross_transaction_amount + t.trade_fee, realizes=True),
            "SELL": lambda n, t: self._remove(n, t.quantity, t.gross_transaction_amount - t.trade_fee, realizes=True),
            "TRANSFER_IN": lambda n, t: self._add(n, t.quantity, t.gross_transaction_amount, realizes=False),
            "TRANSFER_OUT": lambda n, t: self._remove(n, t.quantity, ZERO, realizes=False),
        }

    def apply(self, sequence: int, t: Transaction) -> Entry:
        """The row that the transaction makes; DIVIDEND, INTEREST, FEE and TAX change nothing."""
        after = _quantity_after(self.quantity, t)
        if abs(after) >= OUT_OF_RANGE:
            return Entry(sequence, t, self._state(), out_of_range=True)
        if t.transaction_type == "SPLIT":
            restated = self._split(sequence, after, t.quantity)
            return Entry(sequence, t, self._state(), restated=restated)
        effect = self._effects.get(t.transaction_type)
        opened = effect(sequence, t) if effect else None
        return Entry(sequence, t, self._state(), opened)

    def _state(self) -> CostState:
        return CostState(self.quantity, self.cost, self.realized, self.head)

    def _add(self, sequence: int, units: Decimal, amount: Decimal, *, realizes: bool) -> Lot | None:
        """Close short lots first, for their share of the amount; the rest opens a lot."""
        if units == 0:
            return self._join(sequence, amount)
        closed, proceeds = self._close(units, sign=-1)
        paid = _share(amount, closed, units)
        if realizes:
            self.realized -= proceeds + paid
        return self._open(sequence, units - closed, amount - paid)

    def _remove(self, sequence: int, units: Decimal, amount: Decimal, *, realizes: bool) -> Lot | None:
        """Close long lots first, for their share of the amount; the rest opens a short lot."""
        closed, cost = self._close(units, sign=1)
        received = _share(amount, closed, units)
        if realizes:
            self.realized += received - cost
        return self._open(sequence, closed - units, received - amount)

    def _open(self, sequence: int, quantity: Decimal, cost: Decimal) -> Lot | None:
        if quantity == 0:
            return None
        self.quantity += quantity
        self.cost += cost
        if not self._by_lot:
            return None
        lot = Lot(sequence, quantity, cost)
        if self.head is None and not self._waiting:
            self.head = lot
        else:
            self._waiting.append(lot)
        return lot

    def _join(self, sequence: int, cost: Decimal) -> Lot | None:
        """A cost without units goes to the newest open lot, if there is one."""
        if self.quantity == 0 or cost == 0:
            return None
        self.cost += cost
        if not self._by_lot:
            return None
        if self.head and not self._waiting:
            self.head = Lot(self.head.sequence, self.head.quantity, self.head.cost + cost)
            return None
        newest = self._waiting.pop()
        place = newest.sequence if newest.sequence == _UNREAD else sequence
        self._waiting.append(Lot(place, newest.quantity, newest.cost + cost))
        return Lot(sequence, ZERO, cost)

    def _close(self, wanted: Decimal, sign: int) -> tuple[Decimal, Decimal]:
        """Take up to `wanted` units of the sign off the position: (units closed, their cost)."""
        held, cost = self.quantity * sign, self.cost
        if wanted == 0 or held <= 0:
            return ZERO, ZERO
        if wanted >= held:
            self._clear()
            return held, cost
        part = self._take(wanted, sign) if self._by_lot else _share(cost, wanted, held)
        self.quantity -= wanted * sign
        self.cost -= part
        return wanted, part

    def _clear(self) -> None:
        self.quantity = self.cost = ZERO
        self.head = None
        self._waiting.clear()

    def _take(self, wanted: Decimal, sign: int) -> Decimal:
        """Less than all that is held, off the oldest lots; returns its cost. A used-up head stays as a place."""
        left, cost = wanted, ZERO
        lot = self.head or self._next_lot()
        while True:
            size = lot.quantity * sign
            if size > left:
                part = _share(lot.cost, left, size)
                self.head = Lot(lot.sequence, lot.quantity - left * sign, lot.cost - part)
                return cost + part
            left -= size
            cost += lot.cost
            self.head = Lot(lot.sequence, ZERO, ZERO)
            if left == 0:
                return cost
            lot = self._next_lot()

    def _next_lot(self) -> Lot:
        if not self._waiting or self._waiting[0].sequence == _UNREAD:
            raise LotsMissing(f"of {self.quantity} units some have no lot")
        return self._waiting.popleft()

    def _split(self, sequence: int, total: Decimal, ratio: Decimal) -> Sequence[Lot]:
        """The running sums of the lots times the ratio are rounded, and lots are their differences.

        A lot that becomes zero gives its cost to the next one, the last to the one before it. Nothing is left where the
        total becomes zero: its cost is realized.
        """
        if total == 0:
            self.realized -= self.cost
            self._clear()
            return ()
        self.quantity = total
        if not self._by_lot:
            return ()
        lots: list[Lot] = [self.head] if self.head else []
        while self._waiting:
            lots.append(self._next_lot())
        split: list[Lot] = []
        before, after, cost = ZERO, ZERO, ZERO
        for lot in lots:
            before += lot.quantity
            cost += lot.cost
            units = (before * ratio).quantize(_PLACES, context=_WIDE) - after
            if units:
                split.append(Lot(lot.sequence, units, cost))
                after, cost = after + units, ZERO
        if cost:
            split[-1] = Lot(split[-1].sequence, split[-1].quantity, split[-1].cost + cost)
        # A lot that is alone counts as opened here: nothing stated or opened before lies behind it.
        self.head = split[0] if len(split) > 1 else Lot(sequence, split[0].quantity, split[0].cost)
        self._waiting.extend(split[1:])
        return tuple(split[1:])
