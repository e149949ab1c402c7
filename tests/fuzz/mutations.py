"""What is sent: good records, and mutations of every kind to every topic. Everything follows from the seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date, timedelta
from random import Random
from typing import Any

from streams import topics

CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
_DATES = [date(2025, 1, 1) + timedelta(days=n) for n in range(40)]
_CLOSED = 20
_SECURITIES, _PORTFOLIOS = 25, 5
_NUMBERS = [1, 7, 2**62, 2**63 - 1]  # the first two are drawn, mostly by another security's corrections

_BITS = [bytes([n]) for n in range(256)] + [
    b'"', b"\\u0000", b"\\ud800", b"1e", b"9" * 20, b"-", b".", b"null", b"{}", b"[", b"\xc2\xa0", "٣".encode(),
    b"e99999", b"0e9999", b"Infinity", b"NaN", b"+", b"T24:00", b"\xed\xa0\x80", b"\xff",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """One record to send. good: it must be applied as it is; codec: of the producer that sends it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] = field(default_factory=list)
    codec: str = "none"
    good: bool = False
    kind: str = "good"


def calendar() -> list[Message]:
    """The dates that are closed before anything else."""
    return [
        Message(topics.BUSINESS_DATES, None, _json({"business_date": day.isoformat()}), good=True)
        for day in _DATES[:_CLOSED]
    ]


def messages(random: Random, count: int) -> list[Message]:
    """So many records in any order, a third of them good ones."""
    good = count // 3
    found = [_good(random, number) for number in range(good)]
    found += [_mutated(random, number) for number in range(count - good)]
    random.shuffle(found)
    return found


def _good(random: Random, number: int) -> Message:
    security = f"G{number % _SECURITIES}"
    codec = random.choice(CODECS)
    if number % 4:
        day = _DATES[number // _SECURITIES % len(_DATES)]
        price = {
            "security_id": security,
            "price_date": day.isoformat(),
            "price": f"{number + 1}.25",
            "revision": number,
        }
        return Message(topics.PRICES, security.encode(), _json(price), codec=codec, good=True)
    trade = _trade(random, f"GT{number}", security)
    return Message(topics.TRANSACTIONS, security.encode(), _json(trade), codec=codec, good=True)


def _trade(random: Random, transaction: str, security: str) -> dict[str, Any]:
    day = random.choice(_DATES[:_CLOSED])
    return {
        "transaction_id": transaction, "portfolio_id": f"P{random.randrange(_PORTFOLIOS)}", "security_id": security,
        "transaction_date": f"{day}T{random.randrange(24):02}:15:00Z",
        "transaction_type": random.choice(("BUY", "BUY", "SELL", "TRANSFER_IN", "DIVIDEND")),
        "quantity": str(random.randrange(1, 1000)), "price": random.randrange(1, 500), "trade_fee": "0.5",
    }  # fmt: skip


def _mutated(random: Random, number: int) -> Message:
    topic = random.choices(list(_TEMPLATES), weights=[4, 30, 28, 12, 12, 8, 6])[0]
    fields = _TEMPLATES[topic](random, number)
    key = str(fields.get("security_id", "K")).encode()
    value: bytes | None = _json(fields)
    assert value is not None
    kind = random.choices(list(_KINDS), weights=[40, 8, 6, 6, 4, 4, 3, 6, 6, 3, 2])[0]
    key, value, headers = _KINDS[kind](random, key, value, fields)
    return Message(topic, key, value, headers, random.choice(CODECS), kind=kind)


def _price(random: Random, number: int) -> dict[str, Any]:
    return {
        "security_id": f"M{number % 200}", "price_date": random.choice(_DATES).isoformat(),
        "price": f"{random.randrange(1, 999)}.5", "currency": "USD", "revision": random.randrange(4),
    }  # fmt: skip


def _trigger(random: Random, number: int) -> dict[str, Any]:
    return {
        "security_id": random.choice([f"G{number % _SECURITIES}", f"M{number % 200}"]),
        "earliest_impacted_date": random.choice(["2025-01-06", "9999-12-31", "1900-01-01"]),
        "seq": random.choice(_NUMBERS), "reason": random.choice(["price", "repair"]),
    }  # fmt: skip


def _job(random: Random, number: int) -> dict[str, Any]:
    trigger = _trigger(random, number)
    return {
        "job_id": trigger["seq"], "job_type": "RESET_WATERMARKS", "security_id": trigger["security_id"],
        "earliest_impacted_date": trigger["earliest_impacted_date"], "seq": trigger["seq"],
        "created_at": random.choice(["2025-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "2025-01-01T00:00:00"]),
    }  # fmt: skip


def _status(random: Random, number: int) -> dict[str, Any]:
    return {
        "job_id": random.choice(_NUMBERS), "security_id": f"G{number % _SECURITIES}",
        "status": random.choice(["COMPLETE", "PENDING", "BOOKS_RIGHT", "???"]), "keys_total": None, "keys_done": -1,
    }  # fmt: skip


_TEMPLATES = {
    topics.BUSINESS_DATES: lambda random, number: {"business_date": random.choice(_DATES[:_CLOSED]).isoformat()},
    topics.PRICES: _price,
    topics.TRANSACTIONS: lambda random, number: _trade(random, f"MT{number}", f"M{number % 200}"),
    topics.TRIGGERS: _trigger,
    topics.JOBS: _job,
    topics.STATUS: _status,
    topics.DEAD_LETTERS: _price,
}

Parts = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]


def _bytes(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    changed = bytearray(value)
    for _ in range(random.choice([1, 1, 2, 3])):
        place, what = random.randrange(len(changed)), random.random()
        if what < 0.4:
            changed[place : place + 1] = random.choice(_BITS)
        elif what < 0.7:
            changed[place:place] = random.choice(_BITS)
        elif what < 0.85:
            del changed[place : place + random.randint(1, 3)]
        else:
            changed[place:place] = changed[place : place + random.randint(1, 8)]
    return key, bytes(changed), []


def _field(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    """One field is something else, or is missing."""
    name = random.choice(list(fields))
    odd = [
        None,
        True,
        [],
        {},
        "",
        " ",
        -1,
        2**70,
        1e308,
        "1e999",
        "0001-01-01",
        "9999-12-31",
        "\x00",
        "x" * 300,
        "\u202e",
    ]
    changed = {**fields, name: random.choice(odd)}
    if random.random() < 0.2:
        del changed[name]
    return key, _json(changed), []


def _not_utf8(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    """A byte that is no UTF-8 in a text, that of a field which nobody reads included."""
    name = random.choice([*fields, "note"])
    changed = _json({**fields, name: f"{fields.get(name, '')}@@"}).replace(
        b"@@", random.choice([b"\xff", b"\xed\xa0\x80"])
    )
    return key, changed, []


def _headers(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    held = [None, b"", b"\xff", b"9" * 5000, b"-1", b"x" * 20_000, str(2**70).encode()]
    names = ["event_id", "seq", "job_id", "reason", "detail", "topic", "partition", "offset", "traceparent", "", "é"]
    found = [(random.choice(names), random.choice(held)) for _ in range(random.choice([1, 3, 200]))]
    return key, value, found


def _key(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    return random.choice([None, b"", b"\xff\xfe", b"G0", b"A|B", b"\0", b"k" * 100_000, key + b" "]), value, []


def _deep(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    depth = random.choice([500, 5_000, 100_000])
    return key, value[:-1] + b',"note":' + b"[" * depth + b"]" * depth + b"}", []


def _large(random: Random, key: bytes, value: bytes, fields: dict[str, Any]) -> Parts:
    size = random.choice([900_000, 2**20 + 1, 1_500_000])
    return key, value[:-1] + b',"note":"' + b"n" * size + b'"}', []


_KINDS = {
    "bytes": _bytes,
    "field": _field,
    "not UTF-8": _not_utf8,
    "headers": _headers,
    "key": _key,
    "deep": _deep,
    "large": _large,
    "tombstone": lambda random, key, value, fields: (random.choice([key, None]), None, []),
    "random": lambda random, key, value, fields: (random.randbytes(8), random.randbytes(random.randrange(200)), []),
    "array": lambda random, key, value, fields: (key, b"[" + value + b"]", []),
    "digits": lambda random, key, value, fields: (key, value[:-1] + b',"note":' + b"9" * 5000 + b"}", []),
}


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()
