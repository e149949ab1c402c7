"""Connections to Postgres, the schema's migrations, and which errors pass by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Connection: TypeAlias = asyncpg.Connection
    Pool: TypeAlias = asyncpg.Pool

SCHEMA = "tidemark"
_SERVER_SETTINGS = {"search_path": SCHEMA, "jit": "off", "application_name": "tidemark", "timezone": "UTC"}
_MIGRATION_LOCK = 0x7469_6465  # "tide"; any constant, shared by all that migrate

TRANSIENT = (
    asyncpg.PostgresConnectionError,
    asyncpg.TransactionRollbackError,  # deadlock, serialization failure
    asyncpg.OperatorInterventionError,  # terminated by the administrator, shutdown, starting up
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a failover left us on a replica
    asyncpg.LockNotAvailableError,
    asyncpg.InterfaceError,  # the client's side of a lost connection
    ConnectionError,
    TimeoutError,
    OSError,
)


class DatabaseError(Exception):
    """The database cannot be used; one line says why and what to do."""


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may succeed later without anyone changing it."""
    return isinstance(error, TRANSIENT)


async def connect(dsn: str) -> Connection:
    """One connection with Tidemark's session settings."""
    return await asyncpg.connect(dsn, server_settings=_SERVER_SETTINGS, timeout=10)


async def connect_pool(dsn: str, *, size: int = 4, name: str = "tidemark") -> Pool:
    """A pool of connections with Tidemark's session settings; opens lazily, so a database that is down is no error.

    name: what pg_stat_activity shows.
    """
    settings = {**_SERVER_SETTINGS, "application_name": name}
    return await asyncpg.create_pool(
        dsn, min_size=0, max_size=size, server_settings=settings, timeout=10, command_timeout=None, reset=_keep
    )


@asynccontextmanager
async def leadership(dsn: str, lock: int) -> AsyncIterator[Connection | None]:
    """A connection that holds the advisory lock while it is open, or None when another one holds it."""
    connection = await connect(dsn)
    try:
        leads = await connection.fetchval("select pg_try_advisory_lock($1)", lock)
        yield connection if leads else None
    finally:
        connection.terminate() if connection.is_closed() else await connection.close(timeout=5)


async def _keep(connection: Connection) -> None:
    """A session carries nothing from one use to the next, so nothing is reset: a round trip less per transaction."""


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Connection]:
    """A connection for a command. Raises DatabaseError where the database cannot be reached or is not migrated."""
    try:
        connection = await connect(dsn)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise DatabaseError(f"cannot reach the database: {error or type(error).__name__}") from error
    try:
        yield connection
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
        raise DatabaseError(f"the schema is not up to date, run `tidemark migrate`: {error}") from error
    finally:
        await connection.close()


def migrations() -> list[tuple[int, str, str]]:
    """(version, name, SQL) of every numbered migration, in order."""
    found: list[tuple[int, str, str]] = []
    for entry in resources.files("sinks.migrations").iterdir():
        number, _, rest = entry.name.partition("_")
        if entry.name.endswith(".sql") and number.isdigit():
            found.append((int(number), rest.removesuffix(".sql"), entry.read_text(encoding="utf-8")))
    return sorted(found)


async def migrate(dsn: str) -> list[str]:
    """Create or upgrade the schema; returns the names applied now. Safe to run from many places at once.

    Raises DatabaseError when an applied migration's text has changed or the database is newer than this program.
    """
    try:
        connection = await connect(dsn)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise DatabaseError(f"cannot reach the database: {error or type(error).__name__}") from error
    try:
        async with connection.transaction():
            return await _migrate(connection)
    finally:
        await connection.close()


async def _migrate(connection: Connection) -> list[str]:
    await connection.execute("select pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
    await connection.execute(f"create schema if not exists {SCHEMA}")
    await connection.execute(
        """
        create table if not exists schema_migrations (
            version int primary key, name text not null, sha256 text not null,
            applied_at timestamptz not null default clock_timestamp())
        """
    )
    rows: list[Any] = await connection.fetch("select version, name, sha256 from schema_migrations")
    applied = {row["version"]: row for row in rows}
    known = migrations()
    if ahead := sorted(set(applied) - {version for version, _, _ in known}):
        raise DatabaseError(f"the database has migration {ahead[-1]}, newer than this program: upgrade tidemark")
    done = []
    for version, name, sql in known:
        digest = hashlib.sha256(sql.encode()).hexdigest()
        if version in applied:
            if applied[version]["sha256"] != digest:
                raise DatabaseError(
                    f"migration {version:04d}_{name} was changed after it was applied: restore its file"
                )
            continue
        await connection.execute(sql)
        await connection.execute(
            "insert into schema_migrations (version, name, sha256) values ($1, $2, $3)", version, name, digest
        )
        done.append(f"{version:04d}_{name}")
    return done
