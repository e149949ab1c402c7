"""What an audit found, queued to be put right through the normal path."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from sinks import repairs
from sinks.database import open_connection
from tidemark.oracle import Difference, Key, Method

_KEYS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """keys: to be booked anew from all their transactions. securities: to be valued again from a date on."""

    keys: set[Key]
    securities: dict[str, date]


class Planner:
    """Collects differences; its memory grows with the keys that differ, not with the differences."""

    def __init__(self) -> None:
        self._keys: set[Key] = set()
        self._securities: dict[str, date] = {}

    def add(self, difference: Difference) -> None:
        """Take a difference into account."""
        if _needs_rebuild(difference):
            self._keys.add(difference.key)
        elif difference.day:
            known = self._securities.get(difference.security_id, difference.day)
            self._securities[difference.security_id] = min(known, difference.day)

    def plan(self) -> Plan:
        """What all that was added needs."""
        return Plan(set(self._keys), dict(self._securities))


def _needs_rebuild(difference: Difference) -> bool:
    """A valuation puts right the snapshots of what a key holds, and no more: it leaves alone what never held.

    No correction reaches a closed key whose watermark is beyond L.
    """
    if difference.table == "daily_position_snapshots":
        return difference.problem == "is there, should not be"
    if difference.table == "position_state":
        return difference.column != "watermark_date" or (difference.actual or "") > (difference.expected or "")
    return True


async def carry_out(dsn: str, actor: str, method: Method, wanted: Plan) -> None:
    """Queue it all, in short transactions, each with its row of operator_actions; may be repeated."""
    keys = sorted((security, portfolio) for portfolio, security in wanted.keys)
    securities = sorted(wanted.securities.items())
    async with open_connection(dsn) as connection:
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            async with connection.transaction():
                await repairs.rebuild(connection, actor, keys[first : first + _KEYS_AT_ONCE], method)
        for first in range(0, len(securities), _KEYS_AT_ONCE):
            async with connection.transaction():
                await repairs.revalue(connection, actor, securities[first : first + _KEYS_AT_ONCE])
