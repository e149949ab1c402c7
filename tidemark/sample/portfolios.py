"""Seeded portfolios that trade the sample securities: the same seed gives the same transactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, TypeAlias

from tidemark.sample.prices import load_prices

Record: TypeAlias = dict[str, Any]

HOLDERS = {"SP500": 0.97, "NASDAQ": 0.92, "WTI": 0.9}  # the share of portfolios that hold the security
SPLIT_SECURITY, SPLIT_RATIO = "WTI", Decimal(2)
_SHORT_SELLERS = 0.06
_LEAVERS = 0.08  # the share of keys that are closed before the end


def generate_transactions(seed: int, portfolios: int, dates: Sequence[date]) -> list[Record]:
    """Records of the topic `transactions`, by timestamp, of `portfolios` portfolios trading on `dates`.

    Each key begins with a purchase (a few with a short sale), is added to, sold in part, paid dividends,
    sometimes transferred between portfolios or closed. WTI is split two for one half-way: the price series
    knows of no split, so values double that day. Prices are near the sample's closes on `dates`, which are of
    its business dates.
    """
    market = _Market.of_sample(dates)
    records: list[Record] = []
    for number in range(1, portfolios + 1):
        rng = Random(f"{seed}/{number}")  # noqa: S311 - sample data, not a secret
        for security, share in HOLDERS.items():
            if rng.random() < share:
                neighbour = _portfolio(number % portfolios + 1)
                records += _Account(rng, market, _portfolio(number), security, neighbour).trade()
    return sorted(records, key=lambda record: (record["transaction_date"], record["transaction_id"]))


def _portfolio(number: int) -> str:
    return f"P{number:04d}"


@dataclass(frozen=True)
class _Market:
    dates: Sequence[date]
    closes: dict[tuple[str, date], Decimal]

    @classmethod
    def of_sample(cls, dates: Sequence[date]) -> _Market:
        known = {(row["security_id"], row["price_date"]): Decimal(row["price"]) for row in load_prices()}
        closes: dict[tuple[str, date], Decimal] = {}
        for security in HOLDERS:
            last = next(price for (name, _), price in known.items() if name == security)
            for day in sorted(dates):
                last = known.get((security, day.isoformat()), last)
                closes[security, day] = last
        return cls(sorted(dates), closes)


@dataclass
class _Account:
    """One key's life, from its first trade on."""

    rng: Random
    market: _Market
    portfolio: str
    security: str
    neighbour: str
    held: Decimal = Decimal(0)
    records: list[Record] = field(default_factory=list)

    def trade(self) -> list[Record]:
        days = self._days()
        self._open(days[0])
        split_day = self.market.dates[len(self.market.dates) // 2]
        splits = self.security == SPLIT_SECURITY and days[0] < split_day <= days[-1]
        for day in days[1:]:
            if splits and day >= split_day:
                self._split(split_day)
                splits = False
            self._act(day)
        if self.rng.random() < _LEAVERS:
            self._close(days[-1])
        return self.records

    def _days(self) -> list[date]:
        dates = self.market.dates
        start = self.rng.randrange(max(1, len(dates) // 5))
        count = min(self.rng.randint(4, 12), len(dates) - start)
        later = self.rng.sample(dates[start + 1 :], count - 1)
        return [dates[start], *sorted(later)]

    def _open(self, day: date) -> None:
        if self.rng.random() < _SHORT_SELLERS:
            self._move("SELL", day, self._size())
        else:
            self._move("BUY", day, self._size() * 4)

    def _act(self, day: date) -> None:
        choice = self.rng.choices(("add", "reduce", "dividend", "transfer"), weights=(45, 35, 12, 8))[0]
        part = (abs(self.held) * Decimal(self.rng.randint(10, 60)) / 100).quantize(Decimal("0.01"))
        if choice == "add" or not part:
            self._move("BUY" if self.held >= 0 else "SELL", day, self._size())
        elif choice == "reduce" or self.held < 0:
            self._move("SELL" if self.held > 0 else "BUY", day, part)
        elif choice == "dividend":
            self._record("DIVIDEND", day, self.held, Decimal("0.35"))
        else:
            self._transfer(day, part)

    def _transfer(self, day: date, quantity: Decimal) -> None:
        sent = self._move("TRANSFER_OUT", day, quantity, fee=False)
        self.records.append(
            {
                **sent,
                "transaction_id": sent["transaction_id"] + "-IN",
                "portfolio_id": self.neighbour,
                "transaction_type": "TRANSFER_IN",
            }
        )

    def _close(self, day: date) -> None:
        if self.held:
            self._move("SELL" if self.held > 0 else "BUY", day, abs(self.held), evening=True)

    def _split(self, day: date) -> None:
        self._record("SPLIT", day, SPLIT_RATIO, Decimal(0), at=timedelta(hours=13))
        self.held *= SPLIT_RATIO

    def _move(self, kind: str, day: date, quantity: Decimal, *, fee: bool = True, evening: bool = False) -> Record:
        self.held += quantity if kind == "BUY" else -quantity
        close = self.market.closes[self.security, day]
        price = (close * Decimal(self.rng.randint(9950, 10050)) / 10_000).quantize(Decimal("0.01"))
        at = timedelta(hours=21) if evening else None
        return self._record(kind, day, quantity, price, fee=Decimal("4.95") if fee else Decimal(0), at=at)

    def _size(self) -> Decimal:
        return Decimal(self.rng.randint(100, 5_000)) / 100

    def _record(
        self,
        kind: str,
        day: date,
        quantity: Decimal,
        price: Decimal,
        *,
        fee: Decimal = Decimal(0),
        at: timedelta | None = None,
    ) -> Record:
        """A trade in the exchange's hours, 14:30 to 20:59 UTC, unless said otherwise."""
        time = at or timedelta(hours=14, minutes=30, seconds=self.rng.randrange(389 * 60))
        moment = datetime(day.year, day.month, day.day, tzinfo=UTC) + time
        record: Record = {
            "transaction_id": f"{self.portfolio}-{self.security}-{len(self.records) + 1:03d}",
            "portfolio_id": self.portfolio,
            "security_id": self.security,
            "transaction_date": moment.isoformat().replace("+00:00", "Z"),
            "transaction_type": kind,
            "quantity": str(quantity),
            "price": str(price),
            "gross_transaction_amount": str(quantity * price),
            "trade_fee": str(fee),
            "currency": "USD",
        }
        self.records.append(record)
        return record
