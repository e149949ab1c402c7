"""Python's search for cycles, less often than by default.

It looks at all new containers and, now and then, at all there are. A batch of records is tens of thousands of them and
next to no cycle: with the default (700 new ones) a third of an `intake` worker's time went into looking
(docs/performance.md).
"""

from __future__ import annotations

import gc

_ALLOCATIONS = 50_000
"""Containers made, beyond those freed, until it looks: some megabytes at most that could have been freed sooner."""


def look_less_often() -> None:
    """To be called when everything is imported: what there is by then is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)


def look_now() -> None:
    """To be called when something large that hangs on cycles has just been let go of."""
    gc.collect()
