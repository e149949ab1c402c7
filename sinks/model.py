"""The domain records as the sinks take them: validated, exact decimals, dates in UTC (source: contract, Records)."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Literal

import msgspec

TransactionType = Literal["BUY", "SELL", "TRANSFER_IN", "TRANSFER_OUT", "SPLIT", "DIVIDEND", "INTEREST", "FEE", "TAX"]
CostBasisMethod = Literal["FIFO", "AVCO"]


class Price(msgspec.Struct, frozen=True, gc=False):
    """One closing price; identity (security_id, price_date)."""

    security_id: str
    price_date: date
    price: Decimal
    currency: str = "USD"
    revision: int = 0


class Transaction(msgspec.Struct, frozen=True, gc=False):
    """One transaction, latest revision; identity transaction_id. transaction_date is an aware UTC timestamp."""

    transaction_id: str
    portfolio_id: str
    security_id: str
    transaction_date: datetime
    transaction_type: TransactionType
    quantity: Decimal
    price: Decimal
    gross_transaction_amount: Decimal
    trade_fee: Decimal = Decimal(0)
    currency: str = "USD"
    revision: int = 0
    cancelled: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """(security_id, portfolio_id): the order in which keys are locked."""
        return (self.security_id, self.portfolio_id)

    @property
    def order(self) -> tuple[datetime, bytes]:
        """The place among the key's transactions (semantics, Order): timestamp, then id by its UTF-8 bytes."""
        return (self.transaction_date, self.transaction_id.encode())

    @property
    def position_date(self) -> date:
        """The UTC date of the timestamp."""
        return self.transaction_date.astimezone(UTC).date()


def position_key(portfolio_id: str, security_id: str) -> bytes:
    """The message key of a position: portfolio_id|security_id, with a backslash before an id's own bar or backslash.

    So no two positions share a message key. The SQL function of the same name gives the same.
    """
    parts = (id_.replace("\\", "\\\\").replace("|", "\\|") for id_ in (portfolio_id, security_id))
    return "|".join(parts).encode()


class DeadLetter(msgspec.Struct, frozen=True):
    """A record that was refused: as received, with where it came from and why."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    reason: Literal["malformed", "invalid", "conflicting_duplicate", "too_large", "poison"]
    detail: str


_EARLIEST, _LATEST = date(1900, 1, 1), date(9999, 12, 30)  # the day after it is infinity, to asyncpg
_Seq = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Job(msgspec.Struct, frozen=True):
    """RESET_WATERMARKS for one security from one date; covers corrections up to seq (contract, Output topics)."""

    job_id: _Seq
    security_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
    earliest_impacted_date: date
    seq: _Seq
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    job_type: Annotated[str, msgspec.Meta(max_length=40)] = "RESET_WATERMARKS"

    def __post_init__(self) -> None:
        """Raises ValueError for dates that no late input has, or that are none in another time zone."""
        if not (_EARLIEST <= self.earliest_impacted_date <= _LATEST and 1900 <= self.created_at.year < 9999):
            raise ValueError(f"{self.earliest_impacted_date}, {self.created_at}: not between {_EARLIEST} and {_LATEST}")
