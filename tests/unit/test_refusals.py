"""What a dead letter says: the reason and the detail, to the letter, for every field that can be wrong."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from sinks.model import Price, Transaction
from sinks.prices import winners
from streams.records import LARGEST_RECORD, decode_business_date, decode_price, decode_transaction
from tests.unit.test_records import price, refusal, trade

LONG = "x" * 201
AMOUNT = trade(gross_transaction_amount="-2")
SPLIT = trade(transaction_type="SPLIT", quantity=0)


@pytest.mark.parametrize(
    ("decode", "value", "said"),
    [
        (decode_price, None, "malformed: a tombstone: no value"),
        (decode_price, b" " * (LARGEST_RECORD + 1), "too_large: 1048577 bytes; at most 1048576 are taken"),
        (decode_business_date, b'{"business_date":"1 May"}', "business_date: not an ISO date (YYYY-MM-DD): 1 May"),
        (decode_business_date, b'{"business_date":"2025-02-30"}', "business_date: day is out of range for month"),
        (
            decode_price,
            price(price_date="1899-12-31"),
            "price_date: 1899-12-31 is not between 1900-01-01 and 9999-12-30",
        ),
        (decode_price, price(price="0"), "price: must be above zero, got 0"),
        (decode_price, price(price="x"), "price: not a decimal number: x"),
        (decode_price, price(security_id=""), "security_id: empty"),
        (decode_price, price(security_id=LONG), "security_id: 201 characters; at most 200 are taken"),
        (decode_price, price(price_date="x" * 99), "price_date: not an ISO date (YYYY-MM-DD): " + "x" * 60),
        (decode_price, price(currency="A\n"), "currency: has control characters"),
        (decode_transaction, trade(transaction_id=""), "transaction_id: empty"),
        (decode_transaction, trade(portfolio_id="\x7f"), "portfolio_id: has control characters"),
        (decode_transaction, trade(security_id=LONG), "security_id: 201 characters; at most 200 are taken"),
        (decode_transaction, trade(currency=""), "currency: empty"),
        (decode_transaction, trade(quantity="-1"), "quantity: must not be negative, got -1"),
        (decode_transaction, trade(quantity="1" * 61 + "x"), "quantity: not a decimal number: " + "1" * 60),
        (decode_transaction, trade(quantity="0." + "1" * 999), "quantity: a number of 1001 characters"),
        (decode_transaction, trade(quantity="1" * 19), "quantity: more than 18 digits before the point"),
        (decode_transaction, trade(price="-0.5"), "price: must not be negative, got -0.5"),
        (decode_transaction, trade(trade_fee=-1), "trade_fee: must not be negative, got -1"),
        (decode_transaction, AMOUNT, "gross_transaction_amount: must not be negative, got -2"),
        (decode_transaction, SPLIT, "quantity: a SPLIT's ratio must be above zero"),
        (
            decode_transaction,
            trade(transaction_date="y" * 70),
            "transaction_date: not an ISO timestamp of at most microseconds: " + "y" * 60,
        ),
        (decode_transaction, trade(transaction_date="2025-02-30"), "transaction_date: day is out of range for month"),
        (decode_transaction, trade(transaction_date="2025-01-01T25:00"), "transaction_date: hour must be in 0..23"),
        (
            decode_transaction,
            trade(transaction_date="1900-01-01T00:30:00+01:00"),
            "transaction_date: 1899-12-31 is not between 1900-01-01 and 9999-12-30",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_which_field_and_why(decode: Any, value: bytes | None, said: str) -> None:
    refused = refusal(decode, value)
    assert (f"{refused.reason}: {refused.detail}" if ": a t" in said or "bytes" in said else refused.detail) == said
    assert str(refused) == f"{refused.reason}: {refused.detail}"
    if "bytes" not in said and "tombstone" not in said:
        assert refused.reason == "invalid"


@pytest.mark.parametrize("size", [1, 200])
def test_names_up_to_200_characters_are_taken(size: int) -> None:
    assert decode_price(price(security_id="é" * size)).security_id == "é" * size


def test_a_record_of_the_largest_size_is_taken() -> None:
    record = price()
    assert decode_price(record + b" " * (LARGEST_RECORD - len(record))).price == Decimal("10.25")


def test_numbers_up_to_a_thousand_characters_are_taken() -> None:
    assert decode_transaction(trade(quantity="0." + "1" * 998)).quantity == Decimal("0.1111111111")


def test_a_transaction_is_taken_field_by_field() -> None:
    taken = decode_transaction(
        trade(trade_fee="1.5", currency="EUR", revision=3, cancelled=True, gross_transaction_amount="7", quantity=0)
    )
    assert taken == Transaction(
        "T1", "P1", "S1", datetime(2025, 9, 1, 10, 15, tzinfo=UTC), "BUY", Decimal(0), Decimal("10.5"), Decimal(7),
        Decimal("1.5"), "EUR", 3, True,
    )  # fmt: skip
    plain = decode_transaction(trade(price="0.00000000005", quantity=3))
    assert (plain.gross_transaction_amount, plain.trade_fee, plain.currency, plain.revision) == (0, 0, "USD", 0)
    assert plain.cancelled is False


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2025-09-01", datetime(2025, 9, 1, tzinfo=UTC)),
        ("2025-09-01 10:15", datetime(2025, 9, 1, 10, 15, tzinfo=UTC)),
        ("2025-09-01t10:15:00z", datetime(2025, 9, 1, 10, 15, tzinfo=UTC)),
        ("2025-09-01T10:15:00.000001-0330", datetime(2025, 9, 1, 13, 45, 0, 1, tzinfo=UTC)),
        ("1900-01-01T00:00:00Z", datetime(1900, 1, 1, tzinfo=UTC)),
        ("9999-12-30T23:59:59Z", datetime(9999, 12, 30, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_timestamps_are_taken_as_utc(text: str, moment: datetime) -> None:
    taken = decode_transaction(trade(transaction_date=text)).transaction_date
    assert (taken, taken.utcoffset()) == (moment, moment.utcoffset())


def test_of_prices_for_a_date_the_highest_revision_wins_and_of_equal_ones_the_later() -> None:
    def quote(day: int, value: int, revision: int, security: str = "S") -> Price:
        return Price(security, date(2025, 1, day), Decimal(value), revision=revision)

    batch = [quote(1, 10, 1), quote(2, 20, 0), quote(1, 11, 0), quote(1, 12, 1), quote(1, 13, 0), quote(1, 5, 0, "T")]
    assert winners(batch) == [quote(1, 12, 1), quote(2, 20, 0), quote(1, 5, 0, "T")]
