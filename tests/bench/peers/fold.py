"""The work that every peer does, and how it is timed."""

from __future__ import annotations

import json
import os
import sys
import time
from decimal import Decimal
from typing import Any

from streams.records import decode_price

State = dict[str, tuple[int, Decimal]]
_NONE = (0, Decimal(0))


def config() -> dict[str, Any]:
    """What the benchmark asks for."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def fold(state: State, value: bytes) -> None:
    """One more price of its security."""
    price = decode_price(value)
    count, total = state.get(price.security_id, _NONE)
    state[price.security_id] = count + 1, total + price.price


class Clock:
    """Starts with the first record and ends the process with the last."""

    def __init__(self, records: int) -> None:
        self._records = self._left = records
        self._started = 0.0

    def begin(self) -> None:
        """Before the first record; later calls do nothing."""
        self._started = self._started or time.perf_counter()

    def done(self, count: int, state: State) -> None:
        """After so many records more; prints and ends the process when they are all there."""
        self._left -= count
        if self._left <= 0:
            self.report(sum((total for _, total in state.values()), Decimal(0)))

    def report(self, total: Decimal | None) -> None:
        """Print what was measured and end at once: nothing that a peer does when it stops is measured."""
        seconds = time.perf_counter() - self._started
        print("\n" + json.dumps({"records": self._records, "seconds": seconds, "sum": str(total)}), flush=True)
        os._exit(0)
