"""So many times an hour and no more. Pure."""

from __future__ import annotations

from collections import deque

_SECONDS = 3600.0


class HourlyLimit:
    """Remembers the moments of the last hour."""

    def __init__(self, limit: int) -> None:
        self._moments: deque[float] = deque(maxlen=limit)
        self._limit = limit

    def allow(self, now: float) -> bool:
        """Whether it may happen once more, in which case it counts. now: in seconds of any clock."""
        if len(self._moments) == self._limit and now - self._moments[0] < _SECONDS:
            return False
        self._moments.append(now)
        return True
