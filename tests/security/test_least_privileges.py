"""The whole demo over TLS, with SCRAM and an authorizer.

Each worker has its own user in Kafka and in Postgres, and each user what `tidemark acls` and
`deploy/database-roles.sql` give it, no more.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from functools import partial
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr
from rich.console import Console

from deploy.local.part import Part
from deploy.local.ports import LOOPBACK, Ports, http_status
from deploy.local.process import Command
from sinks import retention
from sinks.database import Connection, connect
from streams import permissions
from streams.kafka_clients import client_settings
from streams.settings import ROLES, Settings
from tests.security.conftest import PASSWORD, SecureKafka
from tests.security.test_acls import prefix as prefix
from tests.security.test_acls import says
from tests.topology import until
from tidemark.demo import make_plan, play

_START_SECONDS = 120.0
_TOKEN = "a token for tests"


@dataclass(frozen=True)
class Installation:
    """settings: of somebody who may do everything; urls: of the workers' web servers, by role; refused_before: how
    often the broker has refused something before they started."""

    settings: Settings
    urls: Mapping[str, str]
    refused_before: int

    async def get(self, path: str) -> Any:
        """From the console's API."""
        return await self._ask("GET", path)

    async def post(self, path: str, body: Any) -> Any:
        """An action in the console's API; it must succeed."""
        return await self._ask("POST", path, json=body)

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {_TOKEN}"}
        async with aiohttp.ClientSession(self.urls["triggers"], headers=headers) as web:
            async with web.request(method, path, **more) as response:
                assert response.status == 200, await response.text()
                return await response.json()


@pytest.fixture
async def installation(
    secure: SecureKafka, prefix: str, database: str, folder: Path, tmp_path: Path
) -> AsyncIterator[Installation]:
    """Four workers, each with users of its own."""
    everything = secure.settings(
        "admin", sasl_username="admin", topic_prefix=prefix, database_url=database, web_token=_TOKEN
    )
    await grant_in_postgres(database)
    ports, urls, workers = Ports(folder / "ports.json"), {}, []
    for role in ROLES:
        port = ports.choose(f"least-{role}")
        urls[role] = f"http://{LOOPBACK}:{port}"
        settings = everything.model_copy(
            update={
                "sasl_username": f"tidemark-{role}",
                "database_url": SecretStr(as_user(database, f"test_{role}")),
                "data_dir": tmp_path / role,
                "web_port": port,
            }
        )
        secure.grant(f"tidemark-{role}", permissions.needed(settings, role))
        await until(says(settings, role, None), "leave to start")
        log = tmp_path / f"{role}.log"
        workers.append(Part(role, partial(launch, role, settings, log), partial(answers, port), lambda: None))
    refused = len(secure.denials())
    try:
        await asyncio.gather(*(worker.start(_START_SECONDS) for worker in workers))
        yield Installation(everything, urls, refused)
        assert sum(worker.restarts for worker in workers) == 0
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


async def grant_in_postgres(database: str) -> None:
    """The groups, and a user in each; users are the server's, so they may be there from another test."""
    connection = await connect(database)
    try:
        await connection.execute(resources.files("deploy").joinpath("database-roles.sql").read_text())
        for role in ROLES:
            await connection.execute(f"drop role if exists test_{role}")
            await connection.execute(f"create role test_{role} login password '{PASSWORD}' in role tidemark_{role}")
    finally:
        await connection.close()


def as_user(dsn: str, user: str) -> str:
    """The same database as another user."""
    scheme, _, rest = dsn.partition("://")
    return f"{scheme}://{user}:{PASSWORD.replace(' ', '%20')}@{rest.rpartition('@')[2]}"


def launch(role: str, settings: Settings, log: Path) -> Command:
    """A worker as an operator starts it."""
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    argv = (sys.executable, "-m", "tidemark", "worker", role)
    return Command(argv, log=log, cwd=Path.cwd(), env={**settings.environment(), **path}, grace_seconds=30)


async def answers(port: int) -> bool:
    """Whether it is ready."""
    return await http_status(LOOPBACK, port, "/readyz", _TOKEN) == 200


async def test_the_demo_runs_with_least_privileges(
    installation: Installation, secure: SecureKafka, folder: Path
) -> None:
    settings = installation.settings
    shown = StringIO()
    plan = make_plan(2018, 20, 30)
    assert await play(settings, plan, Console(file=shown)), shown.getvalue()
    connection = await connect(settings.dsn)
    try:
        await refuse_and_send_again(installation, connection)
        await steer(installation, plan.late_price[1])

        async def done() -> bool:
            return not await connection.fetchval(
                """
                select exists (select from corrections where right_at is null) or exists (select from outbox_events)
                """
            )

        await until(done, "corrections and the outbox")
        books = await connect(as_user(settings.dsn, "test_books"))  # what its worker does once a minute
        assert await retention.purge_history(books, timedelta(0)) > 0
        assert await retention.purge_jobs(books, timedelta(0)) > 0
        await books.close()
    finally:
        await connection.close()
    assert secure.denials()[installation.refused_before :] == []
    assert "permission denied" not in (folder / "postgres.log").read_text()


async def refuse_and_send_again(installation: Installation, connection: Connection) -> None:
    """A record that is refused, repaired by an operator, and sent again."""
    await send(installation.settings, "prices", b"{")

    async def buried() -> bool:
        return bool(await installation.get("/api/dead-letters"))

    await until(buried, "a dead letter")
    (letter,) = await installation.get("/api/dead-letters")
    repaired = json.dumps({"security_id": "REPAIRED", "price_date": "2099-01-01", "price": 1})
    path = f"/api/dead-letters/{letter['partition']}/{letter['offset']}/resubmit"
    await installation.post(path, {"value": repaired})

    async def stored() -> bool:
        return await connection.fetchval("select exists (select from market_prices where security_id = 'REPAIRED')")

    await until(stored, "the repaired record")


async def steer(installation: Installation, price: Mapping[str, Any]) -> None:
    """Every action on a job, while the limit holds it."""
    await installation.post("/api/limit", {"paused": True, "rows_per_second": 5_000})
    record = {**price, "price": str(Decimal(price["price"]) + 1), "revision": 1}
    await send(installation.settings, "prices", json.dumps(record).encode(), price["security_id"].encode())

    async def pending() -> list[Any]:
        return [job for job in await installation.get("/api/jobs") if job["status"] == "PENDING"]

    async def held() -> bool:
        return bool(await pending())

    await until(held, "a job")
    (job,) = await pending()
    for action, arguments in (("prioritise", {"priority": 1}), ("cancel", {}), ("requeue", {})):
        await installation.post(f"/api/jobs/{job['job_id']}/{action}", arguments)
    await installation.post("/api/limit", {"paused": False})


async def send(settings: Settings, topic: str, value: bytes, key: bytes | None = None) -> None:
    """One record, as the user of the settings."""
    producer = AIOKafkaProducer(**client_settings(settings))
    await producer.start()
    try:
        await producer.send_and_wait(settings.topic(topic), value, key=key)
    finally:
        await producer.stop()
