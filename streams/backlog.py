"""The backlog, looked at often and counted no more often than it may cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from sinks import monitor
from sinks.database import Connection

LOAD_SHARE = 300  # a look waits so many times as long as it took: with an observer and two consoles, 1 % of a core
_SOON, _LONGEST = 5.0, 300.0  # seconds; the ledger is never older than the first
_LOOKS = 3
_LATENCY = 0.015  # of the time that a look takes, round trips rather than work


class Backlog:
    """Remembers each part until it may be looked at again: the ledger is cheap, counting a million keys is not."""

    def __init__(self) -> None:
        self._ledger = _Paced(monitor.read_ledger, _SOON)
        self._keys = _Paced(monitor.count_keys, _LONGEST)

    async def read(self, connection: Connection) -> tuple[datetime, monitor.Gauges]:
        """(when the older part was looked at, the backlog)."""
        ledger, keys = await self._ledger.read(connection), await self._keys.read(connection)
        return min(self._ledger.at, self._keys.at), monitor.Gauges(**ledger, **keys)


class _Paced:
    def __init__(self, look: Callable[[Connection], Awaitable[dict[str, Any]]], longest: float) -> None:
        self._look = look
        self._longest = longest
        self._found: dict[str, Any] = {}
        self._again = 0.0
        self._took: deque[float] = deque(maxlen=_LOOKS)
        self.at = datetime.now(UTC)

    async def read(self, connection: Connection) -> dict[str, Any]:
        """What was found last, or now."""
        started = time.monotonic()
        if started >= self._again:
            self.at, self._found = datetime.now(UTC), await self._look(connection)
            ended = time.monotonic()
            self._took.append(ended - started)
            self._again = ended + self._pause()
        return self._found

    def _pause(self) -> float:
        """By the quickest of the last looks: a busy machine makes one slow that costs little."""
        cost = max(0.0, min(self._took) - _LATENCY)
        return min(LOAD_SHARE * cost, self._longest if len(self._took) == _LOOKS else _SOON)
