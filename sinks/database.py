"""Connections to Postgres, the schema's migrations, and which errors pass by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from sinks import server, session

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Connection: TypeAlias = asyncpg.Connection
    Pool: TypeAlias = asyncpg.Pool

SCHEMA = "tidemark"
_SERVER_SETTINGS = {
    "search_path": SCHEMA,
    "jit": "off",
    "application_name": "tidemark",
    "timezone": "UTC",
    # A host that vanishes must not keep its locks until TCP gives up by itself, in two hours.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# Nor must a worker that stands still in the middle of a transaction: it holds its partition's offset row.
_POOL_SETTINGS = {**_SERVER_SETTINGS, "idle_in_transaction_session_timeout": "60000"}
_MIGRATION_LOCK = 0x7469_6465  # "tide"; any constant, shared by all that migrate

BY_INDEX = """
select set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)
"""
"""SQL: for the rest of the transaction rows are looked up by index and in its order, whatever the statistics say.

Statistics lag: made when one security alone had corrections, they take the whole ledger for any security's.
"""

TRANSIENT = (
    asyncpg.PostgresConnectionError,
    asyncpg.TransactionRollbackError,  # deadlock, serialization failure
    asyncpg.OperatorInterventionError,  # terminated by the administrator, shutdown, starting up
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a failover left us on a replica
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InvalidCachedStatementError,  # the schema was upgraded meanwhile
    asyncpg.TargetServerAttributeNotMatched,  # several hosts, and none of them is the primary now
    asyncpg.InternalClientError,  # the server ended the session just before a statement
    ConnectionError,
    TimeoutError,
    OSError,
)


_UNREACHABLE = (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError)


class DatabaseError(Exception):
    """The database cannot be used; one line says why and what to do."""


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may succeed later without anyone changing it."""
    if isinstance(error, asyncpg.InterfaceError):  # the client's side of a lost connection, or a bug of ours
        return "clos" in str(error) or "released back" in str(error)
    return isinstance(error, TRANSIENT) and server.refusal(error) is None


async def connect(dsn: str) -> Connection:
    """One connection with Tidemark's session settings; it is given up when it is not answered (`sinks.session`)."""
    return await session.connect(dsn, server_settings=_SERVER_SETTINGS)


@asynccontextmanager
async def leadership(dsn: str, lock: int) -> AsyncIterator[Connection | None]:
    """A connection that holds the advisory lock while it is open, or None when another one holds it."""
    connection = await connect(dsn)
    try:
        leads = await connection.fetchval("select pg_try_advisory_lock($1)", lock)
        yield connection if leads else None
    finally:
        await connection.close()


@asynccontextmanager
async def open_connection(dsn: str) -> AsyncIterator[Connection]:
    """A connection for a command. Raises DatabaseError when there is no database, or it lacks this version's schema."""
    connection = await _reach(dsn)
    try:
        yield connection
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError) as error:
        raise DatabaseError("the database is older than this program: run `tidemark migrate`") from error
    finally:
        await connection.close()


async def _reach(dsn: str) -> Connection:
    try:
        return await connect(dsn)
    except _UNREACHABLE as error:
        raise DatabaseError(server.explain(error)) from None


async def connect_pool(dsn: str, *, size: int = 4, name: str = "tidemark") -> Pool:
    """A pool of connections with Tidemark's session settings; opens lazily, so a database that is down is no error.

    A session that can only read is given up, so that after a failover the next one finds the primary. name: what
    pg_stat_activity shows.
    """
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        server_settings={**_POOL_SETTINGS, "application_name": name},
        connect=session.connect,
        connection_class=session.Session,
        setup=_refuse_read_only,
        reset=_keep,
    )


async def _refuse_read_only(connection: Any) -> None:
    """Called at each acquire; what it looks at the server has reported by itself. An error closes the session."""
    reported = connection.get_settings()
    if "on" in (getattr(reported, "in_hot_standby", "off"), getattr(reported, "default_transaction_read_only", "off")):
        connection.terminate()  # asyncpg would end it in order, and wait for that
        raise asyncpg.ReadOnlySQLTransactionError("the session cannot write: a failover left us on a replica")


async def _keep(connection: Connection) -> None:
    """A session carries nothing from one use to the next, so nothing is reset: a round trip less per transaction."""


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

    Raises DatabaseError when an applied migration's text has changed or the database is newer than this program, and
    when the server is none that Tidemark runs on.
    """
    connection = await _reach(dsn)
    try:
        if problem := await server.unfit(connection, SCHEMA):
            raise DatabaseError(problem)
        async with connection.transaction():
            return await _migrate(connection)
    finally:
        await connection.close()


async def check_schema(dsn: str) -> None:
    """Raises DatabaseError unless this program may work on the schema; the message says what to do.

    It may on its own version, and on a later one whose migrations only expand: then old and new workers run side by
    side during an upgrade. A database that does not answer now is no error: workers wait for it.
    """
    try:
        async with _checked(dsn) as connection:
            rows: list[Any] = await connection.fetch("select version, name, expands from schema_migrations")
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
        raise DatabaseError("the database has no schema of this program yet: run `tidemark migrate`") from error
    except Exception as error:
        if is_transient(error):
            return
        if isinstance(error, _UNREACHABLE):
            raise DatabaseError(server.explain(error)) from None
        raise
    if missing := [name for version, name, _ in migrations() if version not in {row["version"] for row in rows}]:
        raise DatabaseError(f"the database lacks migration {missing[0]}: run `tidemark migrate`")
    _refuse_if_newer(rows)


@asynccontextmanager
async def _checked(dsn: str) -> AsyncIterator[Connection]:
    """A session with a server, by way of a pooler or not, that Tidemark can run on. Raises DatabaseError."""
    connections: list[Connection] = []
    try:
        for _ in range(2):
            connections.append(await connect(dsn))  # noqa: PERF401 - the first is closed where the second fails
        problem = await server.unfit(connections[0], SCHEMA) or await server.unfit_pair(*connections)
        if problem:
            raise DatabaseError(problem)
        yield connections[0]
    finally:
        for connection in connections:
            await connection.close()


def _refuse_if_newer(applied: Sequence[Any]) -> None:
    known = {version for version, _, _ in migrations()}
    if ahead := sorted(row["version"] for row in applied if row["version"] not in known and not row["expands"]):
        raise DatabaseError(
            f"the database has migration {ahead[-1]}, newer than this program can work on: upgrade tidemark"
        )


async def _migrate(connection: Connection) -> list[str]:
    await connection.execute("select pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
    await connection.execute(f"create schema if not exists {SCHEMA}")
    await connection.execute(
        """
        create table if not exists schema_migrations (
            version int primary key, name text not null, sha256 text not null,
            applied_at timestamptz not null default clock_timestamp());
        alter table schema_migrations add column if not exists expands boolean not null default false
        """
    )
    rows: list[Any] = await connection.fetch("select version, name, sha256, expands from schema_migrations")
    applied = {row["version"]: row for row in rows}
    _refuse_if_newer(rows)
    done = []
    for version, name, sql in migrations():
        digest = hashlib.sha256(sql.encode()).hexdigest()
        if version in applied:
            if applied[version]["sha256"] != digest:
                raise DatabaseError(
                    f"migration {version:04d}_{name} was changed after it was applied: restore its file"
                )
            continue
        await connection.execute(sql)
        await connection.execute(
            "insert into schema_migrations (version, name, sha256, expands) values ($1, $2, $3, $4)",
            version,
            name,
            digest,
            expands(sql),
        )
        done.append(f"{version:04d}_{name}")
    return done


def expands(sql: str) -> bool:
    """Whether the program of the version before may still work on what a migration makes, by its first line."""
    return sql.startswith("-- expand")
