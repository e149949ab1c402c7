"""What the oracle takes and gives: its own records, equal in meaning to the contract's tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Literal, NamedTuple, TypeAlias

Method: TypeAlias = Literal["FIFO", "AVCO"]
Key: TypeAlias = tuple[str, str]
"""(portfolio_id, security_id)."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction's latest revision; the timestamp is aware, amounts have at most 10 decimal places."""

    transaction_id: str
    portfolio_id: str
    security_id: str
    transaction_date: datetime
    transaction_type: str
    quantity: Decimal
    gross_transaction_amount: Decimal
    trade_fee: Decimal = Decimal(0)
    cancelled: bool = False
    price: Decimal = Decimal(0)
    currency: str = "USD"
    revision: int = 0

    @property
    def key(self) -> Key:
        """The position it belongs to."""
        return (self.portfolio_id, self.security_id)

    @property
    def order(self) -> tuple[datetime, bytes]:
        """Its place among the key's transactions (semantics, Order)."""
        return (self.transaction_date, self.transaction_id.encode())

    @property
    def position_date(self) -> date:
        """The UTC date of its timestamp (semantics, Order)."""
        return self.transaction_date.astimezone(UTC).date()


@dataclass(frozen=True, slots=True)
class Price:
    """The price in force for a security and date."""

    security_id: str
    price_date: date
    price: Decimal
    currency: str = "USD"
    revision: int = 0


class HistoryRow(NamedTuple):
    """The key's state after one transaction, as stored (semantics, Positions).

    out_of_range: the transaction would have taken the quantity to 10^30 or beyond, and left the state as it was.
    """

    transaction_id: str
    position_date: date
    sequence: int
    quantity: Decimal
    cost_basis: Decimal
    realized_gain_loss: Decimal
    out_of_range: bool = False


class SnapshotRow(NamedTuple):
    """The key's value at the end of one business date, as stored (semantics, Valuations)."""

    valuation_date: date
    quantity: Decimal
    cost_basis: Decimal
    price: Decimal | None
    price_date: date | None
    market_value: Decimal | None
    unrealized_gain_loss: Decimal | None
    valuation_status: str


@dataclass(frozen=True, slots=True)
class Books:
    """History by sequence and snapshots by date, per key. Keys without transactions do not appear."""

    history: dict[Key, list[HistoryRow]] = field(default_factory=dict)
    snapshots: dict[Key, list[SnapshotRow]] = field(default_factory=dict)

    @property
    def snapshot_count(self) -> int:
        """How many snapshots all keys have together."""
        return sum(map(len, self.snapshots.values()))
