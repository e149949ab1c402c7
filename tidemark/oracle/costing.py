"""Cost of one position: lots taken FIFO or at average cost, long and short (docs/positions.md, The arithmetic)."""

from __future__ import annotations

from collections import deque
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context, Decimal

from tidemark.oracle.model import Method, Transaction

# Wide enough for every sum and product of inputs; only `stored`, `_share` and a split ever round.
EXACT = Context(prec=250, rounding=ROUND_HALF_EVEN)
_CUTTING = Context(prec=250, rounding=ROUND_DOWN)
_PLACES = Decimal("1e-10")
_TIES = Decimal("1e-50")
_SHARES = Decimal("1e-60")
_TOO_MUCH = Decimal(10) ** 30
_ZERO = Decimal(0)


def stored(value: Decimal) -> Decimal:
    """The value as stored: half-even to 10 decimal places.

    It is rounded to 50 places first, so that what shares have lost behind their 60th place decides no tie.
    """
    return value.quantize(_TIES, context=EXACT).quantize(_PLACES, context=EXACT)


def _share(amount: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    """amount x part / whole, cut off behind the 60th decimal place."""
    exact = EXACT.multiply(amount, part)
    return _CUTTING.divide(exact, whole).quantize(_SHARES, context=_CUTTING)


class Position:
    """Running state of one key; lots are (quantity, cost), oldest first, all long or all short, none of zero units."""

    def __init__(self, method: Method) -> None:
        self._average = method == "AVCO"
        self._lots: deque[tuple[Decimal, Decimal]] = deque()
        self.quantity = _ZERO
        self.cost = _ZERO
        self.realized = _ZERO

    def apply(self, transaction: Transaction) -> bool:
        """Apply the effect of one transaction; False, and no effect, where the quantity would go out of range.

        Runs under the context EXACT.
        """
        if abs(self._held_after(transaction)) >= _TOO_MUCH:
            return False
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
        return True

    def _held_after(self, transaction: Transaction) -> Decimal:
        match transaction.transaction_type:
            case "BUY" | "TRANSFER_IN":
                return self.quantity + transaction.quantity
            case "SELL" | "TRANSFER_OUT":
                return self.quantity - transaction.quantity
            case "SPLIT":
                return (self.quantity * transaction.quantity).quantize(_PLACES)
        return self.quantity

    def _increase(self, quantity: Decimal, paid: Decimal, *, realizes: bool) -> None:
        """Close short lots first, against their share of what is paid; the rest opens a long lot.

        Without units the cost goes to the newest lot.
        """
        if not quantity:
            if self._lots:
                held, cost = self._lots.pop()
                self._lots.append((held, cost + paid))
                self.cost += paid
            return
        closed = min(quantity, max(-self.quantity, _ZERO))
        if closed:
            proceeds = -self._take(closed)
            share = _share(paid, closed, quantity)
            if realizes:
                self.realized += proceeds - share
            quantity, paid = quantity - closed, paid - share
        if quantity:
            self._open(quantity, paid)

    def _decrease(self, quantity: Decimal, received: Decimal, *, realizes: bool) -> None:
        """Dispose of long lots first, for their share of what is received; the excess opens a short lot.

        Without units all that is received is realized.
        """
        closed = min(quantity, max(self.quantity, _ZERO))
        cost_of_goods = self._take(closed) if closed else _ZERO
        share = _share(received, closed, quantity) if quantity else received
        if realizes:
            self.realized += share - cost_of_goods
        if closed < quantity:
            self._open(closed - quantity, share - received)

    def _split(self, ratio: Decimal) -> None:
        """Multiply and round the sums of units up to each lot; a lot is what lies between two sums.

        The cost of a lot that is no more goes to the next one, at the end to the last one. Without any it is realized.
        """
        old, new, homeless = _ZERO, _ZERO, _ZERO
        lots: deque[tuple[Decimal, Decimal]] = deque()
        for quantity, cost in self._lots:
            old += quantity
            upto = (old * ratio).quantize(_PLACES)
            if upto == new:
                homeless += cost
            else:
                lots.append((upto - new, cost + homeless))
                new, homeless = upto, _ZERO
        if lots:
            quantity, cost = lots.pop()
            lots.append((quantity, cost + homeless))
        else:
            self.realized -= homeless
            self.cost = _ZERO
        self._lots, self.quantity = lots, new

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
        left, cost = quantity, _ZERO
        while left:
            lot_quantity, lot_cost = self._lots.popleft()
            if abs(lot_quantity) <= left:
                left -= abs(lot_quantity)
                cost += lot_cost
                continue
            part = _share(lot_cost, left, abs(lot_quantity))
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
