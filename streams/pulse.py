"""Whether a worker's loops still go round: what `/healthz` says of a process that runs and yet does nothing.

Each loop beats at every turn, at idle ones too. One that has not for a stated time stands still, and nothing but a new
process will help. A database that is away, or at work on a long statement of this worker's, is no standstill: waiting
is right then, and a restart would mend nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pulse:
    """The loops of one process by name. database_age: seconds since the database last kept it waiting."""

    def __init__(self, seconds: float, database_age: Callable[[], float]) -> None:
        self._seconds = seconds
        self._database_age = database_age
        self._beats: dict[str, float] = {}

    def beat(self, name: str) -> None:
        """The loop goes round; from its first beat on it is expected to."""
        self._beats[name] = time.monotonic()

    def until(self, stopping: Callable[[], bool], name: str) -> Callable[[], bool]:
        """The question that a loop asks at each turn, whether it should stop, as one that beats."""

        def asked() -> bool:
            self.beat(name)
            return stopping()

        return asked

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """A piece of work that ends within the stated time; between two pieces nothing is expected."""
        self.beat(name)
        try:
            yield
        finally:
            self._beats.pop(name, None)

    def end(self, name: str) -> None:
        """The loop is over."""
        self._beats.pop(name, None)

    @property
    def standing(self) -> list[str]:
        """The loops that stand still."""
        if self._database_age() < self._seconds:
            return []
        since = time.monotonic() - self._seconds
        return sorted(name for name, beat in self._beats.items() if beat < since)
