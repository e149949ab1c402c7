"""Real daily closes as records of the topics `prices` and `business-dates` (source: SOURCE.md)."""

from __future__ import annotations

import csv
from datetime import date
from functools import cache
from importlib import resources

MAIN_SECURITY = "SP500"


def load_prices() -> list[dict[str, str]]:
    """Records of the topic `prices`: all closes, by date; prices are decimal text, in USD."""
    return [dict(row) for row in _rows()]


def business_dates() -> list[date]:
    """The dates on which the main index has a close, in order: 251 of them."""
    return [date.fromisoformat(row["price_date"]) for row in _rows() if row["security_id"] == MAIN_SECURITY]


@cache
def _rows() -> tuple[dict[str, str], ...]:
    text = resources.files("tidemark.sample").joinpath("prices.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))
