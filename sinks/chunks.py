"""How many keys, or records, the next chunk takes, so that its transaction stays under a target duration. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

_GROW = 1.5
_SHRINK = 0.5  # at most: one slow commit says little
_TELLING = 10  # times the target: so slow that it was the work, not a commit
_HELD = 20  # chunks that must pass before one grows that was too much altogether
_COMFORT = 0.6  # of the target: below it chunks may grow


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """count: of the next chunk; largest: the bound an operator sets; smallest: what a chunk is worth its fixed cost.

    held: chunks until it may grow again.
    """

    count: int
    largest: int
    target_seconds: float
    smallest: int = 1
    held: int = 0

    def after(self, count: int, seconds: float) -> ChunkSize:
        """The size once a chunk of so many has taken so long."""
        if seconds > self.target_seconds:
            factor = _COMFORT * self.target_seconds / seconds
            if seconds < _TELLING * self.target_seconds:
                factor = max(_SHRINK, factor)
            least = min(self.smallest, self.largest)
            return replace(self, count=max(least, int(min(self.count, max(count, 1)) * factor)))
        if self.held:
            return replace(self, held=self.held - 1)
        if count >= self.count * 0.5 and seconds < _COMFORT * self.target_seconds:
            return replace(self, count=min(self.largest, int(self.count * _GROW) + 1))
        return self

    def halved(self, count: int) -> ChunkSize:
        """The size once a chunk of so many was too much altogether."""
        return replace(self, count=max(1, count // 2), held=_HELD)
