"""Input records: what is taken exactly, what is refused, and why (semantics, Bad input)."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinks.model import Price
from streams.records import LARGEST_RECORD, Rejected, decode_business_date, decode_price, decode_transaction, total

TRADE: dict[str, Any] = {
    "transaction_id": "T1",
    "portfolio_id": "P1",
    "security_id": "S1",
    "transaction_date": "2025-09-01T10:15:00Z",
    "transaction_type": "BUY",
    "quantity": "100",
    "price": 10.5,
}


def price(**fields: Any) -> bytes:
    return json.dumps({"security_id": "S1", "price_date": "2025-09-01", "price": "10.25", **fields}).encode()


def trade(**fields: Any) -> bytes:
    return json.dumps({**TRADE, **fields}).encode()


def refusal(decode: Any, value: bytes | None) -> Rejected:
    with pytest.raises(Rejected) as refused:
        decode(value)
    return refused.value


def test_a_price_has_defaults_and_ignores_unknown_fields() -> None:
    assert decode_price(price(vendor="x")) == Price("S1", date(2025, 9, 1), Decimal("10.25"), "USD", 0)


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("123456789012345678.1234567890", "123456789012345678.1234567890"),
        ('"123456789012345678.1234567890"', "123456789012345678.1234567890"),
        ("0.00000000015", "2E-10"),
        ("0.00000000025", "2E-10"),
        ("1e3", "1000"),
    ],
)
def test_decimals_are_exact_and_round_half_even_at_ten_places(literal: str, expected: str) -> None:
    record = f'{{"security_id":"S","price_date":"2025-09-01","price":{literal}}}'.encode()
    assert decode_price(record).price == Decimal(expected)


@pytest.mark.parametrize(
    "bad",
    [
        "NaN",
        "Infinity",
        "1_0",
        " 5",
        "\uff15",
        "",
        "1e999999999",
        "1" * 19,
        "-1",
        "0",
        True,
        None,
        [1],
        "0.00000000001",
    ],
)
def test_what_is_no_positive_decimal_is_invalid(bad: Any) -> None:
    assert refusal(decode_price, price(price=bad)).reason == "invalid"


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\x00", "\x7f", "\x85"])
def test_ids_are_short_and_printable(name: str) -> None:
    assert refusal(decode_price, price(security_id=name)).reason == "invalid"
    assert refusal(decode_transaction, trade(transaction_id=name)).reason == "invalid"


@pytest.mark.parametrize(
    "value",
    [
        b'{"security_id":"S","price_date":"2025-01-01","price":"1\xff"}',
        b'{"security_id":"S","price_date":"2025-01-01","price":1,"note":"\xff"}',
        b'{"security_id":"S","price_date":"2025-01-01","price":1,"\xff":1}',
        b'{"security_id":"S","price_date":"2025-01-01","price":1,"note":"\xed\xa0\x80"}',
        b'{"security_id":"S\\ud800","price_date":"2025-01-01","price":1}',
        b'{"security_id":"S","price_date":"2025-01-01","price":1,"note":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
)
def test_what_is_no_utf8_or_no_json_anywhere_is_malformed(value: bytes) -> None:
    assert refusal(decode_price, value).reason == "malformed"


def test_whatever_a_decoder_raises_is_a_rejection() -> None:
    @total
    def decode(value: bytes) -> None:
        raise {b"a": KeyError, b"b": ZeroDivisionError, b"c": UnicodeError}[value]("\ud800")

    for value in (b"a", b"b", b"c", b"d"):
        refused = refusal(decode, value)
        assert refused.reason == "malformed"
        assert refused.detail.encode()


@given(st.binary(max_size=6), st.integers(0, 90), st.integers(0, 4))
def test_no_mutation_of_a_record_is_raised_about(noise: bytes, place: int, gone: int) -> None:
    for decode, value in (
        (decode_price, price()),
        (decode_transaction, trade()),
        (decode_business_date, b'{"business_date":"2025-09-01"}'),
    ):
        with contextlib.suppress(Rejected):
            decode(value[:place] + noise + value[place + gone :])


@pytest.mark.parametrize("revision", [1.0, "1", True, None, -1, 2**63])
def test_a_revision_is_a_json_integer(revision: Any) -> None:
    assert refusal(decode_price, price(revision=revision)).reason == "invalid"


@pytest.mark.parametrize(
    "day", ["2025-9-1", "20250901", "1899-12-31", "2025-02-30", "9999-12-31", "10000-01-01", "2025-09-01T00:00Z", 5]
)
def test_dates_are_iso_between_1900_and_9999(day: Any) -> None:
    assert refusal(decode_business_date, json.dumps({"business_date": day}).encode()).reason == "invalid"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-09-01", datetime(2025, 9, 1, tzinfo=UTC)),
        ("2025-09-01T10:15:00", datetime(2025, 9, 1, 10, 15, tzinfo=UTC)),
        ("2025-09-01T10:15:00.5z", datetime(2025, 9, 1, 10, 15, 0, 500_000, tzinfo=UTC)),
        ("2025-09-01T00:30:00+02:00", datetime(2025, 8, 31, 22, 30, tzinfo=UTC)),
    ],
)
def test_timestamps_become_utc(text: str, expected: datetime) -> None:
    assert decode_transaction(trade(transaction_date=text)).transaction_date == expected


@pytest.mark.parametrize(
    "text", ["9999-12-31", "9999-12-30T23:00:00-05:00", "1900-01-01T00:00:00+01:00", "2025-W01-1", "now"]
)
def test_timestamps_outside_the_calendar_are_invalid(text: str) -> None:
    assert refusal(decode_transaction, trade(transaction_date=text)).reason == "invalid"


def test_the_amount_defaults_to_quantity_times_price() -> None:
    assert decode_transaction(trade()).gross_transaction_amount == Decimal("1050.0")
    assert decode_transaction(trade(gross_transaction_amount=7)).gross_transaction_amount == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"transaction_type": "SPLIT", "quantity": 0},
        {"transaction_type": "GIFT"},
        {"quantity": -1},
        {"trade_fee": "-0.01"},
        {"cancelled": 1},
        {"portfolio_id": 7},
    ],
)
def test_wrong_transactions_are_invalid(fields: dict[str, Any]) -> None:
    assert refusal(decode_transaction, trade(**fields)).reason == "invalid"


@pytest.mark.parametrize("value", [None, b"", b"{", b"\xff\xfe", b'{"security_id": "\xff"}', b'{"a":"\\ud800"}'])
def test_what_is_no_json_is_malformed(value: bytes | None) -> None:
    assert refusal(decode_price, value).reason in {"malformed", "invalid"}


def test_a_missing_field_and_another_shape_are_invalid() -> None:
    assert refusal(decode_price, b"[]").reason == "invalid"
    assert refusal(decode_price, b'{"security_id": "S"}').reason == "invalid"


def test_a_record_over_one_mebibyte_is_too_large() -> None:
    assert refusal(decode_price, price(note="x" * LARGEST_RECORD)).reason == "too_large"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_else(value: bytes) -> None:
    for decode in (decode_price, decode_transaction, decode_business_date):
        with pytest.raises(Rejected):
            decode(value)
