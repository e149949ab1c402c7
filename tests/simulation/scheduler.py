"""Processes as coroutines, one step at a time, in an order that a list of numbers decides.

The same numbers give the same run; a failing run is shrunk by making its list shorter and its numbers smaller.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Ready = Callable[[], bool]


@types.coroutine
def pause() -> Generator[Ready | None, None, None]:
    """A point at which any other process may run first."""
    yield None


@types.coroutine
def until(ready: Ready) -> Generator[Ready | None, None, None]:
    """Go on, some time after `ready` has become true."""
    while not ready():
        yield ready


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run alone to the end; a wait that nothing could end is an error."""
    while True:
        try:
            waits_for = work.send(None)
        except StopIteration as end:
            return end.value
        assert waits_for is None or waits_for(), "waits for ever"


class Choices:
    """Numbers drawn from a seed, or replayed; beyond the end of a replay every number is 0."""

    def __init__(self, seed: int = 0, replay: Sequence[int] | None = None) -> None:
        self.taken: list[int] = []
        self._random = random.Random(seed).random
        self._replay = replay

    def draw(self, below: int) -> int:
        """A number in [0, below); 0 is the simplest."""
        if self._replay is None:
            number = int(self._random() * below)
        else:
            place = len(self.taken)
            number = min(self._replay[place], below - 1) if place < len(self._replay) else 0
        self.taken.append(number)
        return number

    def chance(self, one_in: int) -> bool:
        """True once in so many draws."""
        return self.draw(one_in) == one_in - 1

    def pick(self, options: Sequence[T]) -> T:
        """One of them; the first is the simplest."""
        return options[self.draw(len(options))]


def _never() -> bool:
    return False


class Process:
    """A coroutine that is stepped; killed, it is closed where it stands."""

    def __init__(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self.name = name
        self.waits_for: Ready | None = None
        self.asleep_until = 0
        self._work = work
        self.ended = False

    def step(self) -> None:
        """Up to the next pause; what it raises is the run's failure."""
        try:
            self.waits_for = self._work.send(None)
        except StopIteration:
            self.ended = True

    def kill(self) -> None:
        """As kill -9: nothing of it runs any more; what it holds in Postgres is rolled back."""
        self._work.close()
        self.ended = True
        self.waits_for = _never


class Scheduler:
    """Steps whatever can run until nothing can."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.steps = 0
        self._processes: list[Process] = []

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> Process:
        """A new process."""
        process = Process(name, work)
        self._processes.append(process)
        return process

    def run(self, limit: int, between: Callable[[], None] = lambda: None) -> bool:
        """Until all processes wait; False when they did not come to rest within so many steps."""
        while self.steps < limit:
            between()
            process = self._next()
            if process is None:
                return True
            self.steps += 1
            process.step()
            if process.ended:
                self._processes = [p for p in self._processes if not p.ended]
        return False

    def _next(self) -> Process | None:
        """The first that can run, from a place on that is drawn."""
        processes = self._processes
        count = len(processes)
        place = self.choices.draw(count) if count > 1 else 0
        for number in range(place, place + count):
            process = processes[number - count if number >= count else number]
            if process.asleep_until <= self.steps and (process.waits_for is None or process.waits_for()):
                return process
        asleep = [process for process in processes if process.asleep_until > self.steps]
        for process in asleep:
            process.asleep_until = 0
        return self._next() if asleep else None

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()
        self._processes.clear()


def shrink(numbers: Iterable[int], fails: Callable[[Sequence[int]], bool], attempts: int = 400) -> list[int]:
    """A shorter list of smaller numbers that still fails: chunks are removed, then set to 0, then single numbers."""
    best = list(numbers)

    def try_it(candidate: list[int]) -> bool:
        nonlocal best, attempts
        if attempts <= 0 or candidate == best:
            return False
        attempts -= 1
        if fails(candidate):
            best = candidate
            return True
        return False

    size = max(1, len(best) // 2)
    while size:
        place = 0
        while place < len(best):
            if not try_it(best[:place] + best[place + size :]) and not try_it(
                best[:place] + [0] * len(best[place : place + size]) + best[place + size :]
            ):
                place += size
        size //= 2
    while best and best[-1] == 0:
        best.pop()
    return best
