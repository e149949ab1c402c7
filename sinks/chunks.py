"""How many keys the next chunk locks, so that its transaction stays under a target duration. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

SMALLEST = 50
_GROW = 1.5
_SHRINK = 0.5  # at most: one slow commit says little
_COMFORT = 0.6  # of the target: below it chunks may grow


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """keys: of the next chunk; largest: the bound an operator sets."""

    keys: int
    largest: int
    target_seconds: float

    def after(self, keys: int, seconds: float) -> ChunkSize:
        """The size once a chunk of so many keys has taken so long."""
        if seconds > self.target_seconds:
            factor = max(_SHRINK, _COMFORT * self.target_seconds / seconds)
            return replace(self, keys=max(min(SMALLEST, self.largest), int(min(self.keys, max(keys, 1)) * factor)))
        if keys >= self.keys * 0.5 and seconds < _COMFORT * self.target_seconds:
            return replace(self, keys=min(self.largest, int(self.keys * _GROW) + 1))
        return self
