"""A table's local state that its changelog does not know is thrown away: the changelog, and behind it Postgres, rules.

Faust ends such a worker with a ConsistencyError at every start, and overlooks a changelog that holds one record only.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.types import TP


class _Recovery(Recovery):  # type: ignore[misc]
    async def _build_offsets(self, consumer: Any, tps: set[TP], destination: Counter[TP], title: str) -> None:
        """Called for active, then standby partitions; the highwaters of the active ones are known by then."""
        await super()._build_offsets(consumer, tps, destination, title)
        ahead = sorted(tp for tp in tps if _ahead(destination.get(tp), self.active_highwaters.get(tp)))
        if title == "active" and ahead:
            folder = self.app.conf.tabledir
            shutil.rmtree(folder, ignore_errors=True)
            self.app.fail(
                f"the table's state in {folder} is ahead of its changelog ({ahead[0].topic}[{ahead[0].partition}]): "
                "the topic was recreated, or has lost its end. The state is removed; the next start rebuilds it from "
                "the changelog, and the corrections ledger triggers again whatever that does not hold"
            )


def _ahead(persisted: int | None, highwater: int | None) -> bool:
    """Both are offsets of records (-1: none)."""
    return persisted is not None and highwater is not None and persisted > highwater


class Tables(TableManager):  # type: ignore[misc]
    """Faust's, with our recovery."""

    _recovery: Recovery | None = None

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = _Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
