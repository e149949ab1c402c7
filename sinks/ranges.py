"""The ranges of the numbers that come from outside. Settings, web, commands and sinks take them from here.

A number is read from text here too, so that `nan`, `1_000`, `²` or five thousand digits are refused everywhere alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WHOLE = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_REAL = re.compile(r"[+-]?([0-9]{1,19}(\.[0-9]{0,19})?|\.[0-9]{1,19})([eE][+-]?[0-9]{1,3})?", re.ASCII)
_SHOWN = 60


class OutOfRange(ValueError):  # noqa: N818 - an answer to whoever gave the number
    """The number cannot be taken; one line says what is expected."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low:,} to {self.high:,}"

    def parse(self, text: str) -> int:
        """The number that a text states. Raises OutOfRange."""
        return self.check(int(text)) if _WHOLE.fullmatch(text) else _refuse(self, text)

    def check(self, value: object) -> int:
        """The number itself (JSON's 5.0 is 5). Raises OutOfRange, for a truth value too."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high:
            return value
        return _refuse(self, value)


@dataclass(frozen=True, slots=True)
class Real:
    """Finite numbers from low to high, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {_plain(self.low)} to {_plain(self.high)}"

    def parse(self, text: str) -> float:
        """The number that a text states. Raises OutOfRange."""
        return self.check(float(text)) if _REAL.fullmatch(text) else _refuse(self, text)

    def check(self, value: object) -> float:
        """The number itself. Raises OutOfRange, for `nan` and for a truth value too."""
        if isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
            return float(value)
        return _refuse(self, value)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1_000 else f"{value:g}"


def _refuse(expected: Whole | Real, value: object) -> int:
    given = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "more digits than that"
    raise OutOfRange(f"expected {expected}, got {given if len(given) <= _SHOWN else given[:_SHOWN] + '…'}")


RESET_RATE = Real(1, 1e9)
"""Keys per second of all workers together: as setting, through the API, by command, and as a CHECK in Postgres."""

PRIORITY = Whole(-1_000_000, 1_000_000)
"""Of a job; 0 at first."""

ID = Whole(0, 2**63 - 1)
"""What Postgres numbers itself (jobs, corrections), and offsets in Kafka."""

PARTITION = Whole(0, 2**31 - 1)
EPOCH = Whole(0, 2**31 - 1)
SEQUENCE = Whole(0, 2**31 - 1)
"""Of a row in a key's history."""

PAGE = Whole(1, 10_000)
"""Rows of one answer."""

AGE = Whole(0, 100 * 366 * 86_400)
"""How long ago, in seconds."""
