"""Histories that workers of an earlier version wrote by rules which no longer hold are booked anew.

The view `outdated_histories` knows them by what such workers write, also while some of them still run. A rebuild
supersedes it, so the key leaves the view (docs/positions.md, After an upgrade).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sinks import repairs
from sinks.booking import Key
from sinks.database import Connection, Pool, is_transient
from sinks.model import CostBasisMethod

_ACTOR = "upgrade"
_BEFORE_ALL: Key = ("", "")
_KEYS_AT_ONCE = 20
_LOCK = 0x6F75_7464  # "outd"

_NEXT = """
select distinct security_id, portfolio_id from outdated_histories
where (security_id, portfolio_id) > ($1, $2) order by security_id, portfolio_id limit $3
"""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a step has done: how many keys are booked anew, and the errors of those that were left alone."""

    keys: int = 0
    failed: dict[Key, str] = field(default_factory=dict)


class Rebuilder:
    """Goes through the outdated histories in the order of their keys, and begins again at the end."""

    def __init__(self, pool: Pool, method: CostBasisMethod) -> None:
        self._pool = pool
        self._method = method
        self._after = _BEFORE_ALL

    async def step(self) -> Rebuilt:
        """Book the next few anew, in one transaction. One worker at a time does so; the others find nothing.

        A key that cannot be booked is left as it is, and stays in the view.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval("select pg_try_advisory_xact_lock($1)", _LOCK):
                return Rebuilt()
            found = await connection.fetch(_NEXT, *self._after, _KEYS_AT_ONCE)
            keys = [(row["security_id"], row["portfolio_id"]) for row in found]
            failed = await _rebuild(connection, keys, self._method) if keys else {}
        self._after = keys[-1] if keys else _BEFORE_ALL
        return Rebuilt(len(keys) - len(failed), failed)


async def _rebuild(connection: Connection, keys: list[Key], method: CostBasisMethod) -> dict[Key, str]:
    """All together, or each by itself where that fails; returns the errors."""
    try:
        async with connection.transaction():
            await repairs.rebuild(connection, _ACTOR, keys, method)
    except Exception as error:
        if is_transient(error):
            raise
        if len(keys) == 1:
            return {keys[0]: f"{type(error).__name__}: {error}"}
        failed: dict[Key, str] = {}
        for key in keys:
            failed |= await _rebuild(connection, [key], method)
        return failed
    return {}
