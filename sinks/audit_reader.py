"""What the audit reads: the books and their inputs as they stood at one moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeAlias

import asyncpg

from sinks.database import Connection, DatabaseError, connect

Row: TypeAlias = dict[str, Any]

_SECURITIES = """
    select security_id from transactions
    union select security_id from position_state
    union select security_id from position_history where superseded_epoch is null
    union select security_id from daily_position_snapshots
    order by 1
"""
_TRANSACTIONS = """
    select transaction_id, portfolio_id, security_id, transaction_date, transaction_type, quantity, price,
           gross_transaction_amount, trade_fee, currency, revision, cancelled
    from transactions where security_id = $1
"""
_PRICES = """
    select security_id, price_date, price, currency, revision from market_prices where security_id = $1
"""
_HISTORY = """
    select portfolio_id, security_id, transaction_id, position_date, epoch, sequence,
           quantity, cost_basis, realized_gain_loss
    from position_history where security_id = $1 and superseded_epoch is null
"""
_STATES = """
    select portfolio_id, security_id, epoch, watermark_date, status from position_state where security_id = $1
"""
_SNAPSHOTS = """
    select portfolio_id, security_id, valuation_date, epoch, quantity, cost_basis, price, price_date,
           market_value, unrealized_gain_loss, valuation_status
    from daily_position_snapshots where security_id = $1
"""


@dataclass(frozen=True, slots=True)
class SecurityRows:
    """All rows of one security; history: the live ones."""

    transactions: list[Row]
    prices: list[Row]
    history: list[Row]
    states: list[Row]
    snapshots: list[Row]


class BooksReader:
    """Reads within one repeatable-read transaction, so all answers are of the same moment."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def business_dates(self) -> list[date]:
        """The closed dates, in order; the last is L."""
        rows = await self._fetch("select business_date from business_dates order by 1")
        return [row["business_date"] for row in rows]

    async def securities(self) -> list[str]:
        """Every security that the books or the transactions name, in order."""
        return [row["security_id"] for row in await self._fetch(_SECURITIES)]

    async def dirty_keys(self) -> set[tuple[str, str]]:
        """(portfolio_id, security_id) of the keys whose snapshots wait for a valuation or a correction."""
        rows = await self._fetch("select portfolio_id, security_id from dirty_keys")
        return {(row["portfolio_id"], row["security_id"]) for row in rows}

    async def security(self, security_id: str) -> SecurityRows:
        """Everything about one security."""
        return SecurityRows(
            transactions=await self._fetch(_TRANSACTIONS, security_id),
            prices=await self._fetch(_PRICES, security_id),
            history=await self._fetch(_HISTORY, security_id),
            states=await self._fetch(_STATES, security_id),
            snapshots=await self._fetch(_SNAPSHOTS, security_id),
        )

    async def _fetch(self, sql: str, *arguments: object) -> list[Row]:
        return [dict(row) for row in await self._connection.fetch(sql, *arguments)]


@asynccontextmanager
async def open_books(dsn: str) -> AsyncIterator[BooksReader]:
    """The books as they stand now. Raises DatabaseError when they cannot be reached or have no schema."""
    try:
        connection = await connect(dsn)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise DatabaseError(f"cannot reach the database: {error or type(error).__name__}") from error
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            yield BooksReader(connection)
    except asyncpg.UndefinedTableError as error:
        raise DatabaseError("the database has no books yet: run `tidemark migrate`") from error
    finally:
        await connection.close()
