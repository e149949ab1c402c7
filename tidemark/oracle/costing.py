"""Cost of one position: lots taken FIFO or at average cost, long and short (semantics, Positions)."""

from __future__ import annotations

from collections import deque
from decimal import ROUND_HALF_EVEN, Context, Decimal

from tidemark.oracle.model import Method, Transaction

# Far beyond the 28 digits asked for, so that only `stored` ever rounds visibly.
EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN)
_PLACES = Decimal("1e-10")
_GUARD = Decimal("1e-80")
_ZERO = Decimal(0)


def stored(value: Decimal) -> Decimal:
    """The value as stored: half-even to 10 decimal places.

    A division such as 1/3 leaves an error in the 200th digit, which would decide a tie. So it is rounded to
    80 places first, which makes a tie of what is as good as one.
    """
    if int(value.as_tuple().exponent) < -80:
        value = value.quantize(_GUARD, context=EXACT)
    return value.quantize(_PLACES, context=EXACT)


class Position:
    """Running state of one key; lots are (quantity, cost), oldest first, all long or all short."""

    def __init__(self, method: Method) -> None:
        self._average = method == "AVCO"
        self._lots: deque[tuple[Decimal, Decimal]] = deque()
        self.quantity = _ZERO
        self.cost = _ZERO
        self.realized = _ZERO

    def apply(self, transaction: Transaction) -> None:
        """Apply the effect of one transaction. Runs under the context EXACT."""
        quantity, amount = transaction.quantity, transaction.gross_transaction_amount
        fee = transaction.trade_fee
        match transaction.transaction_type:
            case "BUY":
                self._increase(quantity, amount + fee, realizes=True)
            case "SELL":
                self._decrease(quantity, amount - fee, realizes=True)
            case "TRANSFER_IN":
                self._increase(quantity, amount, realizes=False)
            case "TRANSFER_OUT":
                self._decrease(quantity, _ZERO, realizes=False)
            case "SPLIT":
                self._split(quantity)
            case "DIVIDEND" | "INTEREST" | "FEE" | "TAX":
                pass
            case unknown:
                raise ValueError(f"unknown transaction type {unknown!r}")

    def _increase(self, quantity: Decimal, paid: Decimal, *, realizes: bool) -> None:
        """Close short lots first, against their share of what is paid; the rest opens a long lot."""
        closed = min(quantity, max(-self.quantity, _ZERO))
        if closed:
            proceeds = -self._take(closed)
            share = paid * closed / quantity
            if realizes:
                self.realized += proceeds - share
            quantity, paid = quantity - closed, paid - share
        if quantity or not closed:
            self._open(quantity, paid)

    def _decrease(self, quantity: Decimal, received: Decimal, *, realizes: bool) -> None:
        """Dispose of long lots first, for their share of what is received; the excess opens a short lot."""
        closed = min(quantity, max(self.quantity, _ZERO))
        excess = quantity - closed
        cost_of_goods = self._take(closed) if closed else _ZERO
        short_proceeds = received * excess / quantity if excess else _ZERO
        if realizes:
            self.realized += received - short_proceeds - cost_of_goods
        if excess:
            self._open(-excess, -short_proceeds)

    def _split(self, ratio: Decimal) -> None:
        self._lots = deque((quantity * ratio, cost) for quantity, cost in self._lots)
        self.quantity *= ratio

    def _open(self, quantity: Decimal, cost: Decimal) -> None:
        """Add a lot; at average cost there is only ever one."""
        if self._average and self._lots:
            held, held_cost = self._lots.pop()
            self._lots.append((held + quantity, held_cost + cost))
        else:
            self._lots.append((quantity, cost))
        self._moved(quantity, cost)

    def _take(self, quantity: Decimal) -> Decimal:
        """Remove so much from the oldest lots, of either sign; returns their cost, negative if short."""
        sign = 1 if self.quantity > 0 else -1
        everything = quantity == abs(self.quantity)
        left, cost = quantity, _ZERO
        while self._lots and (left or everything):
            lot_quantity, lot_cost = self._lots.popleft()
            if abs(lot_quantity) <= left:
                left -= abs(lot_quantity)
                cost += lot_cost
                continue
            part = lot_cost * left / abs(lot_quantity)
            self._lots.appendleft((lot_quantity - sign * left, lot_cost - part))
            left, cost = _ZERO, cost + part
        self._moved(-sign * quantity, -cost)
        return cost

    def _moved(self, quantity: Decimal, cost: Decimal) -> None:
        self.quantity += quantity
        self.cost += cost
        if not self.quantity:
            self._lots.clear()
            self.cost = _ZERO
