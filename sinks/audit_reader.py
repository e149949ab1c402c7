"""What the audit reads: pieces of the books and of their inputs as they stood at one moment.

A piece is small whatever the installation's size: a range of keys, in the order of the primary keys, or a list of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, TypeAlias

import asyncpg

from sinks.database import Connection, DatabaseError, open_connection

Key: TypeAlias = tuple[str, str]
"""(security_id, portfolio_id): the order of the primary keys."""

Rows: TypeAlias = list[Any]
"""Rows as tuples, in the order of the columns selected."""

FIRST: Key = ("", "")
_AFTER_ALL_IDS = chr(0x10FFFF) * 201  # ids have at most 200 characters
LAST: Key = (_AFTER_ALL_IDS, _AFTER_ALL_IDS)

_IN_RANGE = "(security_id, portfolio_id) > ($1, $2) and (security_id, portfolio_id) <= ($3, $4)"
_IN_LIST = "(security_id, portfolio_id) in (select * from unnest($1::text[], $2::text[]))"

_TRANSACTIONS = """
select transaction_id, portfolio_id, security_id, transaction_date, transaction_type, quantity,
       gross_transaction_amount, trade_fee, cancelled
from transactions where {}
"""
_PRICES = "select security_id, price_date, price from market_prices where security_id = any($1::text[])"
_HISTORY = """
select portfolio_id, security_id, epoch, transaction_id, position_date, sequence, quantity, cost_basis,
       realized_gain_loss, coalesce(out_of_range, false) as out_of_range
from position_history where superseded_epoch is null and {}
order by security_id, portfolio_id, sequence
"""
_SNAPSHOTS = """
select portfolio_id, security_id, epoch, valuation_date, quantity, cost_basis, price, price_date, market_value,
       unrealized_gain_loss, valuation_status
from daily_position_snapshots where {}
order by security_id, portfolio_id, valuation_date
"""
_STATES = """
select portfolio_id, security_id, epoch, watermark_date, status, valued_through, closed_on
from position_state left join securities using (security_id) where {}
"""
_DIRTY = "select portfolio_id, security_id, provisional_from from dirty_keys where {}"
# Key by key: the planner might read the whole table of keys for a list of them.
_DIRTY_LISTED = f"""
select listed.* from unnest($1::text[], $2::text[]) as key (security_id, portfolio_id)
cross join lateral (
    {_DIRTY.format("security_id = key.security_id and portfolio_id = key.portfolio_id")} offset 0
) as listed
"""

_COUNT = f"select count(*) from position_state where {_IN_RANGE}"
_BOUNDARY = f"""
select security_id, portfolio_id from position_state where {_IN_RANGE}
order by security_id, portfolio_id offset $5 limit 1
"""
_OF_PORTFOLIO = """
select security_id, portfolio_id from transactions where portfolio_id = $1
union select security_id, portfolio_id from position_state where portfolio_id = $1
union select security_id, portfolio_id from position_history where portfolio_id = $1 and superseded_epoch is null
union select security_id, portfolio_id from daily_position_snapshots where portfolio_id = $1
order by 1, 2
"""
_SAMPLE = "select security_id, portfolio_id from position_state order by random() limit $1"


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys after `after` and up to `upto`; or, where it is given, the listed ones only."""

    after: Key = FIRST
    upto: Key = LAST
    keys: tuple[Key, ...] | None = None


def of_security(security_id: str) -> Piece:
    """Every key of a security."""
    return Piece((security_id, ""), (security_id, _AFTER_ALL_IDS))


@dataclass(frozen=True, slots=True)
class PieceRows:
    """All rows of a piece; history: the live ones; dirty: the view dirty_keys, with what is provisional of each."""

    business_dates: list[date]
    transactions: Rows
    prices: Rows
    history: Rows
    snapshots: Rows
    states: Rows
    dirty: dict[tuple[str, str], date]
    """By (portfolio_id, security_id)."""


class BooksReader:
    """Reads within one repeatable-read transaction, so all answers are of the same moment."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def snapshot(self) -> str:
        """The moment's name, under which other connections can read it as long as this one is open."""
        name: str = await self._connection.fetchval("select pg_export_snapshot()")
        return name

    async def business_dates(self) -> list[date]:
        """The closed dates, in order; the last is L."""
        rows = await self._connection.fetch("select business_date from business_dates order by 1")
        return [row["business_date"] for row in rows]

    async def count_keys(self, scope: Piece) -> int:
        """How many keys the range has."""
        count: int = await self._connection.fetchval(_COUNT, *scope.after, *scope.upto)
        return count

    async def keys_of_portfolio(self, portfolio_id: str) -> list[Key]:
        """Every key of a portfolio that the books or the transactions name."""
        return [(row[0], row[1]) for row in await self._connection.fetch(_OF_PORTFOLIO, portfolio_id)]

    async def sample(self, size: int) -> list[Key]:
        """So many keys, drawn at random."""
        return [(row[0], row[1]) for row in await self._connection.fetch(_SAMPLE, size)]

    async def head(self, scope: Piece, keys: int) -> Piece:
        """The range's first piece, of so many keys; it has the range's end when there are no more."""
        row = await self._connection.fetchrow(_BOUNDARY, *scope.after, *scope.upto, keys - 1)
        return replace(scope, upto=(row[0], row[1])) if row else scope

    async def read(self, piece: Piece) -> PieceRows:
        """Everything about the piece's keys. Extra rows of keys that have no state belong to a range too."""
        arguments: tuple[Any, ...]
        if piece.keys is None:
            condition, dirty, arguments = _IN_RANGE, _DIRTY, (*piece.after, *piece.upto)
        else:
            condition, dirty = _IN_LIST, _DIRTY_LISTED
            arguments = ([key[0] for key in piece.keys], [key[1] for key in piece.keys])

        async def fetch(sql: str) -> Rows:
            rows: Rows = await self._connection.fetch(sql.format(condition), *arguments)
            return rows

        transactions = await fetch(_TRANSACTIONS)
        securities = sorted({row["security_id"] for row in transactions})
        return PieceRows(
            business_dates=await self.business_dates(),
            transactions=transactions,
            prices=await self._connection.fetch(_PRICES, securities),
            history=await fetch(_HISTORY),
            snapshots=await fetch(_SNAPSHOTS),
            states=await fetch(_STATES),
            dirty={(row[0], row[1]): row[2] for row in await fetch(dirty)},
        )


@asynccontextmanager
async def open_books(dsn: str, snapshot: str | None = None) -> AsyncIterator[BooksReader]:
    """The books as they stand now, or as they stood at an exported snapshot's moment.

    Raises DatabaseError when they cannot be reached or have no schema.
    """
    async with open_connection(dsn) as connection:
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                if snapshot:
                    name = snapshot.replace("'", "''")
                    await connection.execute(f"set transaction snapshot '{name}'")
                yield BooksReader(connection)
        except asyncpg.UndefinedTableError as error:
            raise DatabaseError("the database has no books yet: run `tidemark migrate`") from error
