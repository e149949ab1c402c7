"""How far the background auditor is, and who it is: one at a time, whatever the number of workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sinks import database
from sinks.audit_reader import FIRST, Key
from sinks.database import Connection

_LEADER_LOCK = 0x6175_6474  # "audt"

_CURSOR = "select cursor_security_id, cursor_portfolio_id from audit_progress"

_ADVANCE = """
update audit_progress set
    cursor_security_id = $1, cursor_portfolio_id = $2, keys = keys + $3, differences = differences + $4
"""

_FINISH = """
update audit_progress set
    full_pass_at = clock_timestamp(), started_at = clock_timestamp(), cursor_security_id = '', cursor_portfolio_id = '',
    keys = 0, differences = 0
"""

_AGE = "select extract(epoch from clock_timestamp() - full_pass_at)::float8 from audit_progress"


class Progress:
    """The auditor's own connection, by which it leads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def cursor(self) -> Key:
        """The last key that is done in this pass; FIRST at its beginning."""
        row = await self._connection.fetchrow(_CURSOR)
        return (row["cursor_security_id"], row["cursor_portfolio_id"]) if row else FIRST

    async def advance(self, upto: Key, keys: int, differences: int) -> None:
        """A piece is done."""
        await self._connection.execute(_ADVANCE, *upto, keys, differences)

    async def finish(self) -> None:
        """The pass is over; the next begins."""
        await self._connection.execute(_FINISH)


@asynccontextmanager
async def leadership(dsn: str) -> AsyncIterator[Progress | None]:
    """The progress, for as long as this process leads; None when another auditor does."""
    async with database.leadership(dsn, _LEADER_LOCK) as connection:
        yield Progress(connection) if connection else None


async def full_pass_age(connection: Connection) -> float | None:
    """Seconds since the last full pass ended; None when there was none yet."""
    age: float | None = await connection.fetchval(_AGE)
    return age


async def under_way(connection: Connection) -> tuple[int, int]:
    """(keys, differences) of the pass under way."""
    row = await connection.fetchrow("select keys, differences from audit_progress")
    return (row["keys"], row["differences"]) if row else (0, 0)
