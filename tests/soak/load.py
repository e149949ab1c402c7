"""Mixed load of bounded size: a fixed number of positions and dates, so that what grows without bound is a leak.

Prices are revised, transactions amended and cancelled, old dates and new ones alike; dates close one after another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

_PORTFOLIOS, _SECURITIES, _TRADES, _DATES = 40, 25, 6_000, 40
_FIRST = date(2025, 1, 6)
_LATE = 0.1
_WARM = 1 / 6  # of the time, in which all transactions have come and all dates but a few are closed


class Load:
    """Draws records; a position's history and a price are replaced again and again."""

    def __init__(self, seed: int) -> None:
        self.sent = 0
        self._chance = random.Random(seed)
        self._days = [_FIRST + timedelta(days=n) for n in range(_DATES)]
        self._closed = 0
        self._trades: dict[int, tuple[int, dict[str, Any]]] = {}
        self._prices: dict[tuple[int, date], int] = {}

    def due(self, number: int, progress: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(topic, key, record) up to the numbered one; progress: how much of the time is over, from 0 to 1."""
        closing = min(_DATES, 2 + int(_DATES * min(1.0, 0.8 * progress / _WARM) + 0.2 * _DATES * progress))
        while self._closed < closing:
            record = {"business_date": self._days[self._closed].isoformat()}
            self._closed += 1
            self.sent += 1
            yield "business-dates", record["business_date"], record
        while self.sent < number:
            self.sent += 1
            yield self._price() if self._chance.random() < 0.3 else self._trade()

    def _day(self) -> date:
        """Mostly the last days; one in ten any that is closed."""
        if self._chance.random() < _LATE:
            return self._days[self._chance.randrange(self._closed)]
        return self._days[max(0, self._closed - self._chance.randint(1, 3))]

    def _price(self) -> tuple[str, str, dict[str, Any]]:
        security, day = self._chance.randrange(_SECURITIES), self._day()
        revision = self._prices[security, day] = self._prices.get((security, day), -1) + 1
        price = Decimal(self._chance.randint(1_000, 20_000)) / 100
        record = {"security_id": f"S{security}", "price_date": day.isoformat(), "price": str(price)}
        return "prices", f"S{security}", {**record, "revision": revision}

    def _trade(self) -> tuple[str, str, dict[str, Any]]:
        number = self._chance.randrange(_TRADES)
        revision, known = self._trades.get(number, (-1, {}))
        quantity, price = self._chance.randint(1, 200), Decimal(self._chance.randint(100, 9_999)) / 100
        day = self._day()
        record = {
            "transaction_id": f"T{number}",
            "portfolio_id": known.get("portfolio_id", f"P{self._chance.randrange(_PORTFOLIOS)}"),
            "security_id": known.get("security_id", f"S{self._chance.randrange(_SECURITIES)}"),
            "transaction_date": f"{day.isoformat()}T{self._chance.randrange(24):02}:00:00Z",
            "transaction_type": self._chance.choice(("BUY", "BUY", "SELL", "DIVIDEND")),
            "quantity": quantity,
            "price": str(price),
            "gross_transaction_amount": str(quantity * price),
            "revision": revision + 1,
            "cancelled": self._chance.random() < 0.05,
        }
        self._trades[number] = (revision + 1, record)
        return "transactions", f"S{record['security_id']}", record
