"""Behind pgbouncer: session mode works, transaction mode is refused in one line, and no line shows a password."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.local.part import Part
from deploy.local.ports import LOOPBACK, answers
from deploy.local.postgres import PostgresServer, service_account
from deploy.local.process import Command
from sinks import database as db
from streams.app import free_port
from streams.settings import SettingsError, load_named
from tests.engine import Engine

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer: tests/install-postgres.sh installs it")

_PASSWORD = "s3cret-of-the-pool"
_IGNORED = (
    "search_path, jit, tcp_keepalives_idle, tcp_keepalives_interval, tcp_keepalives_count, tcp_user_timeout, "
    "idle_in_transaction_session_timeout"
)

Behind = Callable[..., "object"]


@pytest.fixture
async def behind(postgres: PostgresServer, empty_database: str, folder: Path) -> AsyncIterator[Behind]:
    """Starts a pgbouncer before the empty database; gives the address that goes through it."""
    url, name = urlsplit(empty_database), f"pool_{uuid.uuid4().hex[:8]}"
    connection = await db.connect(empty_database)
    await connection.execute(f"create role {name} login password '{_PASSWORD}'")
    await connection.execute(f"grant create on database {url.path[1:]} to {name}")
    async with AsyncExitStack() as stack:

        async def start(mode: str, ignored: str = _IGNORED, *, with_role_setting: bool = True) -> str:
            if with_role_setting:
                await connection.execute(f"alter role {name} set search_path = tidemark")
            home = folder / name
            home.mkdir(mode=0o755, exist_ok=True)
            port = free_port(LOOPBACK)
            (home / "users.txt").write_text(f'"{name}" "{_PASSWORD}"\n')
            (home / "pgbouncer.ini").write_text(
                f"[databases]\n* = host={LOOPBACK} port={url.port}\n[pgbouncer]\nlisten_addr = {LOOPBACK}\n"
                f"listen_port = {port}\nunix_socket_dir =\nauth_type = plain\nauth_file = {home / 'users.txt'}\n"
                f"pool_mode = {mode}\ndefault_pool_size = 10\nignore_startup_parameters = {ignored}\n"
            )
            user = service_account() if os.geteuid() == 0 else None
            command = Command(
                argv=(str(PROGRAM), str(home / "pgbouncer.ini")), log=folder / f"{name}.log", cwd=home, user=user
            )
            part = Part("pgbouncer", lambda: command, partial(answers, LOOPBACK, port), lambda: None)
            stack.push_async_callback(part.stop)
            await part.start(30)
            return f"postgresql://{name}:{_PASSWORD}@{LOOPBACK}:{port}{url.path}"

        yield start
    await connection.execute(f"drop owned by {name} cascade; drop role {name}")
    await connection.close()


async def refused(dsn: str) -> str:
    """What a worker's start says, and what `tidemark migrate` does."""
    with pytest.raises(db.DatabaseError) as worker:
        await db.check_schema(dsn)
    said = str(worker.value)
    assert "\n" not in said
    assert _PASSWORD not in said
    return said


async def test_session_mode_works(behind: Behind) -> None:
    dsn = await behind("session")
    assert await db.migrate(dsn)
    await db.check_schema(dsn)
    async with db.leadership(dsn, 4711) as one, db.leadership(dsn, 4711) as other:
        assert one is not None
        assert other is None
    engine = await Engine.on(dsn)
    await engine.take("business-dates", [{"business_date": "2025-01-06"}])
    assert await engine.pool.fetchval("select count(*) from business_dates") == 1
    await engine.pool.close()


async def test_transaction_mode_is_refused(behind: Behind) -> None:
    assert "session mode" in await refused(await behind("transaction"))


async def test_statement_mode_is_refused(behind: Behind) -> None:
    assert "session mode" in await refused(await behind("statement"))


async def test_a_pooler_that_refuses_the_settings_of_a_session_is_no_outage(behind: Behind) -> None:
    """Waited out, as an outage is, it would be waited out for ever."""
    assert "ignore_startup_parameters" in await refused(await behind("session", ""))


async def test_a_pooler_that_drops_the_search_path_is_refused(behind: Behind) -> None:
    dsn = await behind("session", with_role_setting=False)
    assert "search_path" in await refused(dsn)
    with pytest.raises(db.DatabaseError, match="search_path"):
        await db.migrate(dsn)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://tidemark:hush#hush@127.0.0.1:1/db",
        "postgresql://tidemark:hush/hush@127.0.0.1:1/db",
        "postgresql://tidemark:hush@127.0.0.1:port/db",
        "postgresql://tidemark:hush@[127.0.0.1/db",
        "mysql://tidemark:hush@127.0.0.1/db",
    ],
)
async def test_an_address_that_cannot_be_read_is_not_shown(url: str) -> None:
    try:
        dsn = load_named(database_url=url).dsn
    except SettingsError as error:
        said = str(error)
    else:
        said = await refused(dsn)
    assert "TIDEMARK_DATABASE_URL" in said
    assert "hush" not in said
