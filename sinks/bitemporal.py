"""What a key's history was, is, and what a correction made of it: the SQL functions of migration 0003 for programs.

Superseded rows answer until retention removes them; then the question is refused, never answered wrongly.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, datetime

import asyncpg

from sinks.database import Connection, DatabaseError, open_connection

_HISTORY_COLUMNS = (
    "sequence, transaction_id, position_date, epoch, quantity, cost_basis, realized_gain_loss, recorded_at, "
    "superseded_at, superseded_epoch"
)


class History:
    """One key's history. Raises DatabaseError where retention has removed what is asked for."""

    def __init__(self, connection: Connection, portfolio_id: str, security_id: str) -> None:
        self._connection = connection
        self._key = (portfolio_id, security_id)

    async def epoch(self) -> int | None:
        """The key's present epoch; None when there is no such key."""
        found: int | None = await self._connection.fetchval(
            "select epoch from position_state where portfolio_id = $1 and security_id = $2", *self._key
        )
        return found

    async def known_at(self, moment: datetime | None) -> list[dict[str, object]]:
        """The history as it was known at a moment; None: now."""
        return await self._rows(
            f"select {_HISTORY_COLUMNS} from history_known_at($1, $2, coalesce($3::timestamptz, 'infinity'))", moment
        )

    async def of_epoch(self, epoch: int) -> list[dict[str, object]]:
        """The history at the end of an epoch, or as it is now under the present one."""
        return await self._rows(f"select {_HISTORY_COLUMNS} from history_of_epoch($1, $2, $3)", epoch)

    async def as_of(self, day: date, moment: datetime | None) -> list[dict[str, object]]:
        """The position at the end of a date as it was known at a moment (None: now): one row, or none."""
        return await self._rows(
            "select * from position_as_of($1, $2, $3, coalesce($4::timestamptz, 'infinity'))", day, moment
        )

    async def difference(self, old_epoch: int, new_epoch: int) -> list[dict[str, object]]:
        """What changed from one epoch to another."""
        return await self._rows("select * from correction_difference($1, $2, $3, $4)", old_epoch, new_epoch)

    async def _rows(self, sql: str, *arguments: object) -> list[dict[str, object]]:
        try:
            return [dict(row) for row in await self._connection.fetch(sql, *self._key, *arguments)]
        except asyncpg.NoDataFoundError as error:
            raise DatabaseError(str(error)) from None


@asynccontextmanager
async def open_history(dsn: str, portfolio_id: str, security_id: str) -> AsyncIterator[History]:
    """The key's history, as one moment of the database has it. Raises DatabaseError."""
    async with open_connection(dsn) as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        yield History(connection, portfolio_id, security_id)
