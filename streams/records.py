"""Input records: from bytes to the sinks' model, or Rejected (contract, Records; semantics, Bad input)."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache, wraps
from typing import Annotated, Literal, Self, TypeVar

import msgspec

from sinks.model import Price, Transaction, TransactionType

Reason = Literal["malformed", "invalid", "too_large"]

LARGEST_RECORD = 1024 * 1024  # bytes
_ZERO, _PLACES = Decimal(0), Decimal("1e-10")
_EXACT = Context(prec=80, rounding=ROUND_HALF_EVEN)
_is_plain_number = re.compile(r"-?[0-9]{1,18}(?:\.[0-9]{1,10})?", re.ASCII).fullmatch  # within limits, exact as it is
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,4})?", re.ASCII)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?([Zz]|[+-][0-9]{2}:?[0-9]{2})?",
    re.ASCII,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_EARLIEST, _LATEST = date(1900, 1, 1), date(9999, 12, 30)  # the day after it is infinity, to asyncpg


class Rejected(Exception):  # noqa: N818 - an outcome, not an error of this program
    """The record is refused: reason is one of the contract's, detail says what is wrong with which field."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail.encode(errors="replace").decode()  # a lone surrogate could not be stored


class Refused(bytes):
    """The value of a record that could not be read from its topic: as much of it as is kept, with the reason."""

    reason: Reason
    detail: str

    def __new__(cls, kept: bytes | bytearray | memoryview, reason: Reason, detail: str) -> Self:
        """kept: at most LARGEST_RECORD bytes and one, so that nobody takes them for the whole."""
        value = super().__new__(cls, kept)
        value.reason, value.detail = reason, detail
        return value


_BigInt = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _BusinessDate(msgspec.Struct, gc=False):
    business_date: str


class _Transaction(msgspec.Struct, gc=False):
    transaction_id: str
    portfolio_id: str
    security_id: str
    transaction_date: str
    transaction_type: TransactionType
    quantity: msgspec.Raw
    price: msgspec.Raw
    gross_transaction_amount: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    trade_fee: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    currency: str = "USD"
    revision: _BigInt = 0
    cancelled: bool = False


class _Price(msgspec.Struct, gc=False):
    security_id: str
    price_date: str
    price: msgspec.Raw
    currency: str = "USD"
    revision: _BigInt = 0


T = TypeVar("T")
_Decode = Callable[[bytes | None], T]

_business_date = msgspec.json.Decoder(_BusinessDate)
_price = msgspec.json.Decoder(_Price)
_transaction = msgspec.json.Decoder(_Transaction)


def total(decode: Callable[[bytes], T]) -> _Decode[T]:
    """Make every failure of a decoder a rejection, whatever the bytes are: the one place that decides on the reason."""

    @wraps(decode)
    def decoded(value: bytes | None) -> T:
        if value is None:
            raise Rejected("malformed", "a tombstone: no value")
        if isinstance(value, Refused):
            raise Rejected(value.reason, value.detail)
        if len(value) > LARGEST_RECORD:
            raise Rejected("too_large", too_large(len(value)))
        try:
            str(value, "utf-8")  # msgspec does not look into fields that it skips
            return decode(value)
        except (Rejected, MemoryError):
            raise
        except msgspec.ValidationError as error:
            raise Rejected("invalid", str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Rejected("malformed", str(error)) from None
        except Exception as error:
            raise Rejected("malformed", f"{type(error).__name__}: {error}") from None

    return decoded


def too_large(size: int) -> str:
    """The detail of a record that is larger than what is taken."""
    return f"{size} bytes; at most {LARGEST_RECORD} are taken"


@total
def decode_business_date(value: bytes) -> date:
    """A record of business-dates. Raises Rejected."""
    return _day(_business_date.decode(value).business_date, "business_date")


@total
def decode_price(value: bytes) -> Price:
    """A record of prices. Raises Rejected."""
    wire = _price.decode(value)
    price = _decimal(wire.price, "price")
    if price <= _ZERO:
        raise Rejected("invalid", f"price: must be above zero, got {price}")
    return Price(
        _name(wire.security_id, "security_id"),
        _day(wire.price_date, "price_date"),
        price,
        _name(wire.currency, "currency"),
        wire.revision,
    )


@total
def decode_transaction(value: bytes) -> Transaction:
    """A record of transactions; a missing gross_transaction_amount is quantity x price. Raises Rejected."""
    wire = _transaction.decode(value)
    quantity = _not_negative(wire.quantity, "quantity")
    price = _not_negative(wire.price, "price")
    if wire.transaction_type == "SPLIT" and quantity == 0:
        raise Rejected("invalid", "quantity: a SPLIT's ratio must be above zero")
    if wire.gross_transaction_amount is msgspec.UNSET:
        amount = _rounded(_EXACT.multiply(quantity, price))
    else:
        amount = _not_negative(wire.gross_transaction_amount, "gross_transaction_amount")
    return Transaction(
        _name(wire.transaction_id, "transaction_id"),
        _name(wire.portfolio_id, "portfolio_id"),
        _name(wire.security_id, "security_id"),
        _timestamp(wire.transaction_date, "transaction_date"),
        wire.transaction_type,
        quantity,
        price,
        amount,
        Decimal(0) if wire.trade_fee is msgspec.UNSET else _not_negative(wire.trade_fee, "trade_fee"),
        _name(wire.currency, "currency"),
        wire.revision,
        wire.cancelled,
    )


def _name(text: str, field: str) -> str:
    if text.isprintable() and 0 < len(text) <= 200:  # nearly all are; the rest need a closer look
        return text
    if not text:
        raise Rejected("invalid", f"{field}: empty")
    if len(text) > 200:
        raise Rejected("invalid", f"{field}: {len(text)} characters; at most 200 are taken")
    if _CONTROL.search(text):
        raise Rejected("invalid", f"{field}: has control characters")
    return text


def _decimal(raw: msgspec.Raw, field: str) -> Decimal:
    """Exact, then rounded half-even to 10 places (semantics, Bad input); a JSON number or a string like one."""
    literal = str(raw, "utf-8").strip('"')
    if _is_plain_number(literal):
        return Decimal(literal)
    if not _NUMBER.fullmatch(literal):
        raise Rejected("invalid", f"{field}: not a decimal number: {literal[:60]}")
    if len(literal) > 1000:
        raise Rejected("invalid", f"{field}: a number of {len(literal)} characters")
    value = Decimal(literal)
    if not value:
        return _ZERO  # whatever its exponent
    if value.adjusted() >= 18:
        raise Rejected("invalid", f"{field}: more than 18 digits before the point")
    return _rounded(value)


def _rounded(value: Decimal) -> Decimal:
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and exponent >= -10:
        return value
    with localcontext(_EXACT) as context:
        context.prec = max(80, len(value.as_tuple().digits) + 30)
        return value.quantize(_PLACES)


def _not_negative(raw: msgspec.Raw, field: str) -> Decimal:
    value = _decimal(raw, field)
    if value < 0:
        raise Rejected("invalid", f"{field}: must not be negative, got {value}")
    return value


@lru_cache(4096)  # a feed says the same few dates again and again
def _day(text: str, field: str) -> date:
    if not _DATE.fullmatch(text):
        raise Rejected("invalid", f"{field}: not an ISO date (YYYY-MM-DD): {text[:60]}")
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise Rejected("invalid", f"{field}: {error}") from None
    return _in_range(day, field)


def _in_range(day: date, field: str) -> date:
    if not _EARLIEST <= day <= _LATEST:
        raise Rejected("invalid", f"{field}: {day} is not between {_EARLIEST} and {_LATEST}")
    return day


def _timestamp(text: str, field: str) -> datetime:
    """An aware UTC timestamp; without offset it is UTC, a bare date means midnight UTC (contract, Records)."""
    if _DATE.fullmatch(text):
        day = _day(text, field)
        return datetime(day.year, day.month, day.day, tzinfo=UTC)
    if not _TIMESTAMP.fullmatch(text):
        raise Rejected("invalid", f"{field}: not an ISO timestamp of at most microseconds: {text[:60]}")
    try:
        moment = datetime.fromisoformat(text.upper())
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Rejected("invalid", f"{field}: {error}") from None
    _in_range(moment.date(), field)
    return moment
