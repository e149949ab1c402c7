"""The whole books from transactions, prices and business dates (semantics, Positions and Valuations)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal, localcontext

from tidemark.oracle.costing import EXACT, Position, stored
from tidemark.oracle.model import Books, HistoryRow, Key, Method, Price, SnapshotRow, Transaction

_NOTHING = Decimal(0)


def compute_books(
    transactions: Iterable[Transaction],
    prices: Iterable[Price],
    business_dates: Iterable[date],
    method: Method,
) -> Books:
    """What the books must be.

    transactions and prices are the latest revisions, cancelled transactions included; business_dates the
    closed ones; all in any order. Keys whose transactions are all cancelled do not appear.
    """
    calendar = sorted(set(business_dates))
    quotes = _by_security(prices)
    books = Books()
    with localcontext(EXACT):
        for key, ordered in _by_key(transactions).items():
            rows = position_history(ordered, method)
            books.history[key] = rows
            if snapshots := position_snapshots(rows, quotes.get(key[1], []), calendar):
                books.snapshots[key] = snapshots
    return books


def position_history(ordered: Iterable[Transaction], method: Method) -> list[HistoryRow]:
    """History rows of one key, whose live transactions are given in order."""
    with localcontext(EXACT):
        position, rows = Position(method), []
        for sequence, transaction in enumerate(ordered, start=1):
            in_range = position.apply(transaction)
            rows.append(
                HistoryRow(
                    transaction.transaction_id,
                    transaction.position_date,
                    sequence,
                    stored(position.quantity),
                    stored(position.cost),
                    stored(position.realized),
                    not in_range,
                )
            )
    return rows


def position_snapshots(
    history: Sequence[HistoryRow], quotes: Sequence[Price], calendar: Sequence[date]
) -> list[SnapshotRow]:
    """Snapshots of one key; its security's quotes and the closed business dates are given in order."""
    if not history:
        return []
    history_dates = [row.position_date for row in history]
    quote_dates = [quote.price_date for quote in quotes]
    snapshots, held_before = [], False
    with localcontext(EXACT):
        for day in calendar[bisect_left(calendar, history_dates[0]) :]:
            last = history[bisect_right(history_dates, day) - 1]
            held = last.quantity != 0
            if held or held_before:
                place = bisect_right(quote_dates, day)
                snapshots.append(_snapshot(day, last, quotes[place - 1] if place else None))
            held_before = held
    return snapshots


def _snapshot(day: date, last: HistoryRow, quote: Price | None) -> SnapshotRow:
    value = _market_value(last.quantity, quote)
    return SnapshotRow(
        valuation_date=day,
        quantity=last.quantity,
        cost_basis=last.cost_basis,
        price=quote.price if quote else None,
        price_date=quote.price_date if quote else None,
        market_value=value,
        unrealized_gain_loss=None if value is None else value - last.cost_basis,
        valuation_status=_status(day, quote),
    )


def _market_value(quantity: Decimal, quote: Price | None) -> Decimal | None:
    """Quantity x price; a closed position is worth nothing whether there is a price or not."""
    if not quantity:
        return _NOTHING
    return stored(quantity * quote.price) if quote else None


def _status(day: date, quote: Price | None) -> str:
    if quote is None:
        return "UNVALUED"
    return "VALUED_CURRENT" if quote.price_date == day else "VALUED_STALE"


def _by_key(transactions: Iterable[Transaction]) -> dict[Key, list[Transaction]]:
    live: dict[Key, list[Transaction]] = defaultdict(list)
    for transaction in transactions:
        if not transaction.cancelled:
            live[transaction.key].append(transaction)
    for of_key in live.values():
        of_key.sort(key=lambda transaction: transaction.order)
    return dict(sorted(live.items()))


def _by_security(prices: Iterable[Price]) -> dict[str, list[Price]]:
    quotes: dict[str, list[Price]] = defaultdict(list)
    for price in prices:
        quotes[price.security_id].append(price)
    for of_security in quotes.values():
        of_security.sort(key=lambda price: price.price_date)
    return quotes
