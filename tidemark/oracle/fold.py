"""From records as they arrive, with duplicates and revisions, to the inputs in force (contract, Records)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any

from tidemark.oracle.books import compute_books
from tidemark.oracle.model import Books, Method, Price, Transaction

_INTAKE = Context(prec=200, rounding=ROUND_HALF_EVEN)
_PLACES = Decimal("1e-10")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Latest revisions by identity, and the closed business dates."""

    transactions: dict[str, Transaction] = field(default_factory=dict)
    prices: dict[tuple[str, date], Price] = field(default_factory=dict)
    business_dates: set[date] = field(default_factory=set)

    def books(self, method: Method) -> Books:
        """The books these inputs make."""
        return compute_books(self.transactions.values(), self.prices.values(), self.business_dates, method)


def fold_inputs(records: Iterable[tuple[str, Mapping[str, Any] | str | bytes]]) -> Inputs:
    """Fold valid records, (topic, value), in order of arrival. Topics are named without prefix.

    A transaction's second record of the same revision is ignored, whether it is a duplicate or conflicts.
    Raises ValueError or KeyError on a record that is bad: what happens to those is not the oracle's matter.
    """
    inputs = Inputs()
    for topic, value in records:
        record = value if isinstance(value, Mapping) else json.loads(value, parse_float=Decimal)
        match topic:
            case "business-dates":
                inputs.business_dates.add(date.fromisoformat(record["business_date"]))
            case "prices":
                _fold_price(inputs, _price(record))
            case "transactions":
                _fold_transaction(inputs, _transaction(record))
            case unknown:
                raise ValueError(f"not an input topic: {unknown!r}")
    return inputs


def _fold_price(inputs: Inputs, price: Price) -> None:
    identity = (price.security_id, price.price_date)
    known = inputs.prices.get(identity)
    if known is None or price.revision >= known.revision:
        inputs.prices[identity] = price


def _fold_transaction(inputs: Inputs, transaction: Transaction) -> None:
    known = inputs.transactions.get(transaction.transaction_id)
    if known is None or transaction.revision > known.revision:
        inputs.transactions[transaction.transaction_id] = transaction


def _price(record: Mapping[str, Any]) -> Price:
    return Price(
        security_id=record["security_id"],
        price_date=date.fromisoformat(record["price_date"]),
        price=_decimal(record["price"]),
        currency=record.get("currency", "USD"),
        revision=record.get("revision", 0),
    )


def _transaction(record: Mapping[str, Any]) -> Transaction:
    return Transaction(
        transaction_id=record["transaction_id"],
        portfolio_id=record["portfolio_id"],
        security_id=record["security_id"],
        transaction_date=_timestamp(record["transaction_date"]),
        transaction_type=record["transaction_type"],
        quantity=_decimal(record["quantity"]),
        price=_decimal(record["price"]),
        gross_transaction_amount=_decimal(record["gross_transaction_amount"]),
        trade_fee=_decimal(record.get("trade_fee", 0)),
        currency=record.get("currency", "USD"),
        revision=record.get("revision", 0),
        cancelled=record.get("cancelled", False),
    )


def _decimal(value: Decimal | str | int | float) -> Decimal:
    """Exactly what the JSON says, rounded to 10 decimal places only if it has more (semantics, Positions)."""
    number = Decimal(str(value))
    if int(number.as_tuple().exponent) < -10:
        return number.quantize(_PLACES, context=_INTAKE)
    return number


def _timestamp(text: str) -> datetime:
    """ISO 8601; without offset it is UTC, a bare date means midnight UTC (contract, Records)."""
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
