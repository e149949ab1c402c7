"""Random but seeded streams of input records, in order of arrival, for tests against the oracle.

Everything the contract allows to go wrong does: duplicates, amendments, cancellations and moves that arrive
out of order, ties of timestamp, weekends, UTC offsets, late and future-dated records, dates that close out of
order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from random import Random
from typing import Any

from tidemark.oracle import Books, Method, fold_inputs

Event = tuple[str, dict[str, Any]]

_TYPES = {
    "BUY": 40,
    "SELL": 30,
    "TRANSFER_IN": 8,
    "TRANSFER_OUT": 8,
    "SPLIT": 3,
    "DIVIDEND": 4,
    "INTEREST": 2,
    "FEE": 3,
    "TAX": 2,
}
_OFFSETS = (0, 0, 0, 120, -300, 330)  # minutes east of UTC
_FLAT_PORTFOLIO = "flat"
_SPLITS = ("2", "3", "0.5", "1.5")
_MARKS = ("t", "T", "ä", "\uffee", "\U0001f600")  # whose order by UTF-8 bytes is no other order


@dataclass(frozen=True)
class Shape:
    """How large a scenario is; rates are probabilities."""

    events: int = 2_500  # at least so many records in all
    portfolios: int = 5  # one of them trades round trips only
    securities: int = 5
    business_dates: int = 30  # of the calendar; the last `open_dates` of them never close
    open_dates: int = 3
    start: date = date(2025, 3, 3)  # a Monday
    amended: float = 0.25
    duplicated: float = 0.12
    priced: float = 0.85
    late: float = 0.2
    round_trips: float = 0.03


def generate(seed: int, shape: Shape | None = None, **changes: Any) -> list[Event]:
    """(topic, record) in order of arrival; records are JSON-ready. changes: fields of Shape.

    No two records of one identity and revision differ in meaning, so the books do not depend on how
    partitions are interleaved: any order of arrival makes the same books.
    """
    return _Generator(Random(seed), replace(shape or Shape(), **changes)).events()


def expected_books(events: list[Event], method: Method = "FIFO") -> Books:
    """The books these events must lead to."""
    return fold_inputs(events).books(method)


def counts(events: list[Event]) -> Counter[str]:
    """How many records each topic gets."""
    return Counter(topic for topic, _ in events)


class _Generator:
    def __init__(self, random: Random, shape: Shape) -> None:
        self._random = random
        self._shape = shape
        weeks = shape.business_dates // 5 + 2
        days = [shape.start + timedelta(days=n) for n in range(weeks * 7)]
        self._business = [day for day in days if day.weekday() < 5][: shape.business_dates]
        self._days = [day for day in days if day <= self._business[-1]]
        self._portfolios = [f"P{n}" for n in range(shape.portfolios - 1)]
        self._securities = [f"S{n}" for n in range(shape.securities)]
        self._arrivals: list[tuple[float, Event]] = []

    def events(self) -> list[Event]:
        self._calendar()
        for security in self._securities:
            self._prices(security)
        number = 0
        while len(self._arrivals) < self._shape.events:
            if self._chance(self._shape.round_trips):
                self._round_trip(number)
            else:
                self._life_of_a_transaction(number)
            number += 1
        return [event for _, event in sorted(self._arrivals, key=lambda arrival: arrival[0])]

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _arrive(self, day: date, topic: str, record: dict[str, Any]) -> None:
        """Soon after its day, or much later, or (one in ten) well before it."""
        due = (day - self._shape.start).days + self._random.random()
        if self._chance(self._shape.late):
            due += self._random.uniform(0, len(self._days))
        elif self._chance(0.1):
            due -= self._random.uniform(1, 6)
        self._arrivals.append((due, (topic, record)))
        if self._chance(self._shape.duplicated):
            self._arrivals.append((due + self._random.uniform(0, 8), (topic, self._again(record))))

    def _calendar(self) -> None:
        closing = self._business[: -self._shape.open_dates or None]
        for day in closing:
            due = (day - self._shape.start).days + 1.0
            if day != closing[-1] and self._chance(0.1):
                due += self._random.uniform(2, 10)  # closes after its successors: a calendar repair
            for again in range(1 + self._chance(self._shape.duplicated)):
                record = {"business_date": day.isoformat()}
                self._arrivals.append((due + again, ("business-dates", record)))

    def _prices(self, security: str) -> None:
        """A walk with gaps, some of them long; weekends too; revisions of some dates, out of order."""
        price = Decimal(self._random.randint(500, 20_000)) / 100
        begin = self._random.choice((0, 0, 3, 10))
        for day in self._days[begin:]:
            price = max(Decimal("0.01"), price * self._random.randint(96, 105) / 100)
            if not self._chance(self._shape.priced if day.weekday() < 5 else 0.1):
                continue
            revision = self._random.choice((0, 0, 0, 2))
            for step in range(self._random.choice((1, 1, 1, 2, 3))):
                value = self._number((price * (100 + 3 * step) / 100).quantize(Decimal("0.000001")))
                record = {"security_id": security, "price_date": day.isoformat(), "price": value}
                self._arrive(day, "prices", self._with_revision(record, revision + step))

    def _life_of_a_transaction(self, number: int) -> None:
        """A transaction and its amendments, each of which arrives in its own time."""
        identity = f"{self._random.choice(_MARKS)}{number:05d}"
        key = (self._random.choice(self._portfolios), self._random.choice(self._securities))
        day = self._random.choice(self._days)
        revision = self._random.choice((0, 0, 0, 1))
        self._arrive(day, "transactions", self._transaction(identity, key, day, revision))
        while self._chance(self._shape.amended):
            revision += self._random.randint(1, 2)
            if self._chance(0.2):
                key = (self._random.choice(self._portfolios), self._random.choice(self._securities))
            if self._chance(0.4):
                day = self._random.choice(self._days)
            record = self._transaction(identity, key, day, revision)
            if self._chance(0.25):
                record["cancelled"] = True
            self._arrive(day, "transactions", record)

    def _round_trip(self, number: int) -> None:
        """Bought (or sold short) and soon closed, in a portfolio that does nothing else: it is often flat."""
        key = (_FLAT_PORTFOLIO, self._random.choice(self._securities))
        opened = self._random.randrange(len(self._days))
        closed = min(opened + self._random.choice((0, 0, 1, 2, 4)), len(self._days) - 1)
        kinds = self._random.choice((("BUY", "SELL"), ("SELL", "BUY"), ("TRANSFER_IN", "TRANSFER_OUT")))
        quantity, price = self._quantity_and_price("BUY")
        for kind, day in zip(kinds, (opened, closed), strict=True):
            identity = f"{self._random.choice(_MARKS)}{number:05d}{kind}"
            record = self._transaction(identity, key, self._days[day], 0)
            record["transaction_type"] = kind
            record["quantity"], record["price"] = f"{quantity:f}", f"{price:f}"
            record["gross_transaction_amount"] = f"{quantity * price:f}"
            self._arrive(self._days[day], "transactions", record)

    def _transaction(self, identity: str, key: tuple[str, str], day: date, revision: int) -> dict[str, Any]:
        kind = self._random.choices(list(_TYPES), weights=list(_TYPES.values()))[0]
        quantity, price = self._quantity_and_price(kind)
        record: dict[str, Any] = {
            "transaction_id": identity,
            "portfolio_id": key[0],
            "security_id": key[1],
            "transaction_date": self._timestamp(day),
            "transaction_type": kind,
            "quantity": self._number(quantity),
            "price": self._number(price),
            "gross_transaction_amount": self._number(quantity * price),
        }
        if self._chance(0.4):
            record["trade_fee"] = self._number(Decimal(self._random.randint(0, 2_000)) / 100)
        if self._chance(0.05):
            record["note"] = "a field nobody knows"
        return self._with_revision(record, revision)

    def _quantity_and_price(self, kind: str) -> tuple[Decimal, Decimal]:
        if kind == "SPLIT":
            return Decimal(self._random.choice(_SPLITS)), Decimal(0)
        price = Decimal(self._random.randint(1, 2_000_000)) / 10_000
        if self._chance(0.03):
            price += Decimal(self._random.randint(1, 999)) / 10**12  # more places than are kept
        whole = self._random.randint(1, 20) * 5  # round lots often, so that positions do come to zero
        return (Decimal(whole) if self._chance(0.6) else Decimal(whole) + Decimal("0.125")), price

    def _timestamp(self, day: date) -> str:
        """On a coarse grid, so that ties are common; a bare date, without offset, in UTC or in a far zone."""
        style = self._random.random()
        if style < 0.1:
            return day.isoformat()
        moment = datetime(day.year, day.month, day.day, self._random.choice((0, 9, 9, 15, 23)), tzinfo=UTC)
        if style < 0.2:
            return moment.replace(tzinfo=None).isoformat()
        if style < 0.5:
            return moment.isoformat().replace("+00:00", "Z")
        return moment.astimezone(timezone(timedelta(minutes=self._random.choice(_OFFSETS)))).isoformat()

    def _with_revision(self, record: dict[str, Any], revision: int) -> dict[str, Any]:
        if revision or self._chance(0.3):
            record["revision"] = revision
        return record

    def _number(self, value: Decimal) -> str | int | float:
        """As text, as a JSON integer or, where that says exactly the same, as a JSON number with a point."""
        style = self._random.random()
        if style < 0.2 and value == value.to_integral_value():
            return int(value)
        if style < 0.4 and Decimal(repr(float(value))) == value:
            return float(value)
        return f"{value:f}"

    def _again(self, record: dict[str, Any]) -> dict[str, Any]:
        """The same content, sometimes written otherwise."""
        copy = dict(record)
        if self._chance(0.3):
            copy = dict(_written_otherwise(copy))
        return copy


def _written_otherwise(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in reversed(record):
        value = record[name]
        if name in ("quantity", "price", "trade_fee", "gross_transaction_amount"):
            value = f"{Decimal(str(value)):f}"
            value += "00" if "." in value else ".0"
        yield name, value
