"""Whether a database server, and what stands before it, is one that Tidemark can run on. Asked once, at a start."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    from sinks.database import Connection

OLDEST = 15
"""The oldest major version of Postgres that the tests run on."""

_TRANSACTION_MODE = (
    "the database is behind a connection pooler that gives a session's transactions to different servers: Tidemark "
    "needs sessions of its own (locks, LISTEN). Use the pooler's session mode, or name Postgres itself in "
    "TIDEMARK_DATABASE_URL"
)
_SETTINGS_REFUSED = (
    "the connection pooler refuses Tidemark's session settings: let it ignore them (pgbouncer: "
    "ignore_startup_parameters), set them on the role (alter role ... set search_path = tidemark), and use its session "
    "mode"
)
_ROUNDS = 3

_FIRST_SCHEMA = "select trim(split_part(current_setting('search_path'), ',', 1), ' \"')"


def refusal(error: BaseException) -> asyncpg.ProtocolViolationError | None:
    """What a connection pooler says of something that it never lets pass, perhaps while it hangs up."""
    found = error.__cause__ if isinstance(error, asyncpg.ConnectionDoesNotExistError) else error
    return found if isinstance(found, asyncpg.ProtocolViolationError) else None


def explain(error: BaseException) -> str:
    """Why there is no connection, in one line that never holds the address, since passwords are in it."""
    if refused := refusal(error):
        if "startup parameter" in str(refused):
            return f"{_SETTINGS_REFUSED} ({refused})"
        return f"{_TRANSACTION_MODE} ({refused})"
    if isinstance(error, asyncpg.DuplicatePreparedStatementError | asyncpg.InvalidSQLStatementNameError):
        return _TRANSACTION_MODE
    if isinstance(error, ValueError):  # of the address itself, which asyncpg and urllib quote
        return (
            "the database's address cannot be read: expected postgresql://user:password@host:port/database, with every "
            "special character of the password percent-encoded (TIDEMARK_DATABASE_URL)"
        )
    return f"cannot reach the database: {error or type(error).__name__}"


async def unfit(connection: Connection, schema: str) -> str | None:
    """What is wrong with the server, or with the session it gives us; None when nothing is."""
    version = connection.get_server_version()
    if version.major < OLDEST:
        return f"Postgres {version.major} is too old: Tidemark needs version {OLDEST} or later"
    first = await connection.fetchval(_FIRST_SCHEMA)
    if first != schema:
        return (
            f"the session's search_path begins with {first!r} and not with {schema!r}, as asked for: a connection "
            f"pooler has dropped it. Set it on the role (alter role ... set search_path = {schema})"
        )
    return None


async def unfit_pair(one: Connection, other: Connection) -> str | None:
    """What is wrong with two sessions at once: neither may get a lock that the other holds, nor lose its own."""
    for _ in range(_ROUNDS):
        lock = secrets.randbits(62)
        await one.fetchval("select pg_try_advisory_lock($1)", lock)
        async with other.transaction():
            got_it_too = await other.fetchval("select pg_try_advisory_xact_lock($1)", lock)
            kept = await one.fetchval("select pg_advisory_unlock($1)", lock)
        if got_it_too or not kept:
            return _TRANSACTION_MODE
    return None
