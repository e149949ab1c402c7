"""One embedded Postgres and, where a test asks for it, one embedded Kafka per process; each test has its own database.

`make test` runs several processes. What the tests of a folder or a module share is made once: they stay together.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from deploy.local.kafka import KafkaServer
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from sinks.database import Pool, connect, connect_pool, migrate
from tests.gate import open_gate
from tests.ports import block_of_ports
from tests.servers import serving

_FIRST = ("chaos", "security", "web", "lifecycle")
"""The longest tests, so that no process is left alone with one of them in the end."""
_QUICK = ("simulation", "unit")
"""What needs no server, and comes last."""
_TOGETHER = ("security", "web")
"""Folders whose modules share a topology or a broker."""
_TEMPLATE = "migrated"
_ANOTHER_POSTGRES = "TIDEMARK_TEST_POSTGRES_BIN"

settings.register_profile("standing", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("standing")  # how long an example takes says how busy the machine is, and nothing about us


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests, and mark the quick ones."""
    if os.environ.get(_ANOTHER_POSTGRES):
        _leave_what_needs_postgres_alone(config, items)
    order = [*_FIRST, "", *_QUICK]
    items.sort(key=lambda item: order.index(folder if (folder := _folder(item)) in order else ""))
    for item in items:
        if _folder(item) in _QUICK:
            item.add_marker(pytest.mark.quick)


def _leave_what_needs_postgres_alone(config: pytest.Config, items: list[pytest.Item]) -> None:
    needed = [set(getattr(item, "fixturenames", ())) for item in items]
    other = [item for item, names in zip(items, needed, strict=True) if "postgres" not in names or "kafka" in names]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in set(other)]


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What a module or one of the folders shares is made once; --dist loadgroup has no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((folder for folder in _TOGETHER if path.startswith(f"tests/{folder}/")), path)

    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def _ports() -> Iterator[None]:
    with block_of_ports():
        yield


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Where the process's servers live."""
    path = Path(tempfile.mkdtemp(prefix="tidemark-test-"))
    path.chmod(0o711)  # started by root, Postgres runs as a user of its own
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
async def postgres(folder: Path) -> AsyncIterator[PostgresServer]:
    """The process's Postgres: the embedded one, or that whose programs are in TIDEMARK_TEST_POSTGRES_BIN.

    It never loses power, so it need not wait for the disk.
    """
    bin_folder = Path(named) if (named := os.environ.get(_ANOTHER_POSTGRES)) else None
    ports, log = Ports(folder / "ports.json"), folder / "postgres.log"
    server = PostgresServer(folder / "postgres", log, ports, {"fsync": "off"}, bin_folder)
    async with serving("postgres", server):
        yield server


@pytest.fixture(scope="session")
async def kafka(folder: Path) -> AsyncIterator[str]:
    """The address of the process's Kafka, kafka://host:port."""
    server = KafkaServer(folder / "kafka", folder / "kafka.log", Ports(folder / "ports.json"))
    async with serving("kafka", server):
        yield server.url


@pytest.fixture(scope="session")
async def migrated(postgres: PostgresServer) -> str:
    """The name of a database with the schema and nothing in it, to be copied."""
    await migrate(await postgres.create_database(_TEMPLATE))
    return _TEMPLATE


@pytest.fixture
async def database(postgres: PostgresServer, migrated: str) -> AsyncIterator[str]:
    """The address of a fresh database with the schema, its gate open, dropped afterwards."""
    async with _fresh(postgres, f"template {migrated}") as dsn:
        await open_gate(dsn)
        yield dsn


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    """Sessions in the fresh database, as a worker has them."""
    async with await connect_pool(database) as opened:
        yield opened


@pytest.fixture
async def empty_database(postgres: PostgresServer) -> AsyncIterator[str]:
    """The address of a fresh database without a schema, dropped afterwards."""
    async with _fresh(postgres) as dsn:
        yield dsn


@asynccontextmanager
async def _fresh(postgres: PostgresServer, options: str = "") -> AsyncIterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = await connect(postgres.url("postgres"))
    try:
        await server.execute(f"create database {name} {options}")
    finally:
        await server.close()
    try:
        yield postgres.url(name)
    finally:
        await postgres.drop_database(name)
