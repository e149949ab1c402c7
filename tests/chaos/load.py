"""The load of a chaos run: seeded, large, and such that each record's effect can be counted against its offset.

A good price or transaction stores or replaces exactly one row, a bad record leaves exactly one dead letter, and no two
records of one identity can meet in one batch (they would be folded into one write). Most records are plain growth:
prices and transactions dated after the last closed date. The rest makes the corrections: late prices, revisions,
back-dated transactions, amendments, cancellations, dates that close out of order.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from typing import Any

from streams.topics import BUSINESS_DATES, PRICES, TRANSACTIONS
from tidemark.oracle.fold import Inputs, fold_inputs

_SECURITIES = 40
_DATES = 20
_START = date(2025, 3, 3)  # a Monday
_AFTER = date(2026, 1, 1)  # no date from here on is closed
_GROWING, _CORRECTED = 60, 20  # portfolios whose trades are dated after the calendar, and within it
_APART = 6_000  # records of one topic between two of one identity; more than a batch in any partition
_BAD = (b"{", b"\xff", b"[]", b'{"business_date": "2025-02-30", "security_id": "", "transaction_id": ""}')


@dataclass(frozen=True)
class Sent:
    """One record to send; bad: it must end in the dead letters."""

    topic: str
    key: bytes
    value: bytes
    bad: bool = False


@dataclass
class Load:
    """Everything a run sends, in order, and the inputs it must leave in force."""

    records: list[Sent]
    inputs: Inputs
    counts: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


def make(seed: int, per_topic: int) -> Load:
    """So many records in each of the three input topics; the same seed makes the same load."""
    chance = random.Random(f"load {seed}")
    streams = [_calendar(chance, per_topic), _prices(chance, per_topic), _transactions(chance, per_topic)]
    records = [record for together in zip(*streams, strict=True) for record in together]
    good = ((record.topic, record.value) for record in records if not record.bad)
    return Load(
        records,
        fold_inputs(good),
        Counter(record.topic for record in records),
        Counter(record.topic for record in records if record.bad),
    )


def business_dates() -> list[date]:
    """The dates that close during a run."""
    days = (_START + timedelta(days=n) for n in range(2 * _DATES))
    return [day for day in days if day.weekday() < 5][:_DATES]


def _sent(topic: str, key: str, record: dict[str, Any]) -> Sent:
    return Sent(topic, key.encode(), json.dumps(record).encode())


def _bad(chance: random.Random, topic: str, number: int) -> Sent:
    return Sent(topic, b"bad%d" % (number % 64), chance.choice(_BAD), bad=True)


def _calendar(chance: random.Random, count: int) -> Iterator[Sent]:
    """Each date closes once, in order but for two, and comes again and again."""
    days = business_dates()
    for late in (5, 12):
        days[late], days[late + 1] = days[late + 1], days[late]
    for number in range(count):
        closed = days[: 1 + number * _DATES // count]
        if chance.random() < 0.1:
            yield _bad(chance, BUSINESS_DATES, number)
            continue
        day = closed[-1] if chance.random() < 0.5 else chance.choice(closed)
        yield _sent(BUSINESS_DATES, str(number % 64), {"business_date": day.isoformat()})


def _prices(chance: random.Random, count: int) -> Iterator[Sent]:
    """Every security is priced on every date, some late, many again; the others are for the future."""
    days = business_dates()
    known: list[tuple[int, str, date]] = []  # when it came, of what
    revisions: Counter[tuple[str, date]] = Counter()
    live = [(security, day) for day in days for security in range(_SECURITIES)]
    every = max(2, count // (len(live) + 1))
    future = 0
    for number in range(count):
        if chance.random() < 0.02:
            yield _bad(chance, PRICES, number)
        elif number % every == 0 and live:
            security, day = live.pop(chance.randrange(min(60, len(live))))  # up to two dates out of order
            known.append((number, f"S{security}", day))
            yield _price(chance, f"S{security}", day, 0)
        elif known and number - known[0][0] >= _APART and chance.random() < 0.02:
            _, name, day = known.pop(0)
            revisions[name, day] += 1
            known.append((number, name, day))
            yield _price(chance, name, day, revisions[name, day])
        else:
            security, later = future % _SECURITIES, future // _SECURITIES
            future += 1
            yield _price(chance, f"S{security}", _AFTER + timedelta(days=later), 0)


def _price(chance: random.Random, security: str, day: date, revision: int) -> Sent:
    value = {"security_id": security, "price_date": day.isoformat(), "price": f"{chance.randint(1, 10**6) / 100:.2f}"}
    return _sent(PRICES, security, {**value, "revision": revision})


def _transactions(chance: random.Random, count: int) -> Iterator[Sent]:
    """Growth in order; trades within the calendar, some back-dated, some amended, moved in time or cancelled."""
    days = business_dates()
    known: list[tuple[int, dict[str, Any]]] = []
    for number in range(count):
        security = f"S{chance.randrange(_SECURITIES)}"
        if chance.random() < 0.01:
            yield _bad(chance, TRANSACTIONS, number)
        elif chance.random() < 0.85:
            at = datetime.combine(_AFTER, time()) + timedelta(seconds=20 * number)
            yield _trade(chance, number, f"G{chance.randrange(_GROWING)}", security, at)
        elif known and number - known[0][0] >= _APART and chance.random() < 0.1:
            yield _amended(chance, known.pop(0)[1])
        else:
            reached = 1 + number * _DATES // count
            day = days[chance.randrange(reached)] if chance.random() < 0.1 else days[reached - 1]
            at = datetime.combine(day, time()) + timedelta(seconds=number * _DATES * 86_000 // count % 86_000)
            sent = _trade(chance, number, f"C{chance.randrange(_CORRECTED)}", security, at)
            known.append((number, json.loads(sent.value)))
            yield sent


def _trade(chance: random.Random, number: int, portfolio: str, security: str, at: datetime) -> Sent:
    quantity, price = chance.randint(1, 500), chance.randint(1, 10**6)
    record = {
        "transaction_id": f"t{number:07}",
        "portfolio_id": portfolio,
        "security_id": security,
        "transaction_date": f"{at.isoformat()}Z",
        "transaction_type": chance.choice(("BUY", "BUY", "SELL", "DIVIDEND")),
        "quantity": quantity,
        "price": f"{price / 100:.2f}",
        "gross_transaction_amount": f"{quantity * price / 100:.2f}",
    }
    return _sent(TRANSACTIONS, security, record)


def _amended(chance: random.Random, record: dict[str, Any]) -> Sent:
    changed = {**record, "revision": 1, "quantity": record["quantity"] + 1, "cancelled": chance.random() < 0.3}
    return _sent(TRANSACTIONS, record["security_id"], changed)
