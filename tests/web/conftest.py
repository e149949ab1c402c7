"""One running stack with a token, shared by the tests of the API, the console and the metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from deploy.local.postgres import PostgresServer
from tests.topology import Topology, run_topology
from tests.web.world import DAYS, TOKEN, ledger_of


@pytest.fixture(scope="package")
async def running(kafka: str, postgres: PostgresServer, folder: Path) -> AsyncIterator[Topology]:
    """Four workers, ten closed dates, and the key (P/1, A/B ü) with a correction in its past."""
    dsn = await postgres.create_database("web")
    async with run_topology(kafka, dsn, folder, web_token=TOKEN, log_format="json") as topology:
        await topology.send([("business-dates", {"business_date": day}) for day in DAYS])
        await topology.settle()
        for events in ledger_of("P/1", "A/B ü"):
            await topology.send(events)
            await topology.settle()
        yield topology


@pytest.fixture
async def web(running: Topology) -> AsyncIterator[aiohttp.ClientSession]:
    """A program that has the token."""
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Tidemark-Actor": "tests"}
    async with aiohttp.ClientSession(base_url=running.stack.worker_url("triggers"), headers=headers) as session:
        yield session


@pytest.fixture
async def stranger(running: Topology) -> AsyncIterator[aiohttp.ClientSession]:
    """A program that has not."""
    async with aiohttp.ClientSession(base_url=running.stack.worker_url("triggers")) as session:
        yield session
