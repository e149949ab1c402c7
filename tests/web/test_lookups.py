"""Table look-ups with two and three workers while the group changes: right or 503, never wrong.

A thousand securities have a job in flight that nobody works on, so every answer has one right value all the time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from confluent_kafka import ConsumerGroupState
from confluent_kafka.admin import AdminClient

from deploy.local.postgres import PostgresServer
from deploy.local.stack import Stack
from sinks.database import connect_pool
from streams.settings import load_named
from tests.topology import Topology, until

SECURITIES = [f"S{number:03}" for number in range(990)] + [
    "a/b", "a%2Fb", "ünïcødé", "日本", "with space", "q?x=1", "#frag", "..", "a&b;c", "emoji 🌊",
]  # fmt: skip
PARTITIONS = 6


class Group:
    """Workers of role `triggers` that come and go, and who asks them."""

    def __init__(self, topology: Topology, folder: Path, program: Sequence[str]) -> None:
        self.topology = topology
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.workers: dict[str, Stack] = {}
        self._folder = folder
        self._program = program
        self._stopping = asyncio.Event()
        self._expected: dict[str, Any] = {}

    async def join(self, name: str, *, wait: bool = True) -> None:
        """Start one more worker, which is asked from its first second on."""
        settings = self.topology.settings.model_copy(update={"data_dir": self._folder / name})
        stack = Stack(settings, roles=["triggers"], program=self._program)
        self.workers[name] = stack
        starting = asyncio.create_task(stack.start())
        if wait:
            await starting

    def url(self, name: str) -> str:
        return self.workers[name].worker_url("triggers")

    def signal(self, name: str, number: signal.Signals) -> None:
        pid = self.workers[name].workers["triggers"].pid
        assert pid is not None
        os.kill(pid, number)

    async def learn(self) -> None:
        """The right answers, from a quiet group; every security has one."""
        async with aiohttp.ClientSession() as web, asyncio.timeout(90):
            while len(self._expected) < len(SECURITIES):
                await asyncio.sleep(0.2)
                async with web.get(f"{self.url('first')}/api/triggers", params={"limit": "10000"}) as response:
                    rows = await response.json(content_type=None) if response.status == 200 else []
                self._expected = {row["security_id"]: row for row in rows}
        assert set(self._expected) == set(SECURITIES)

    @asynccontextmanager
    async def asked(self) -> AsyncIterator[None]:
        """Two askers per worker, without a pause, as long as this lasts."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as web:
            askers = [asyncio.create_task(self._ask_on(web, seed)) for seed in range(6)]
            try:
                yield
            finally:
                self._stopping.set()
                await asyncio.gather(*askers)

    async def _ask_on(self, web: aiohttp.ClientSession, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stopping.is_set():
            name = chance.choice([name for name, stack in self.workers.items() if "triggers" in stack._web] or [""])
            if name:
                await self.ask(web, name, chance.choice(SECURITIES), chance.random())
            await asyncio.sleep(0.005)

    async def ask(self, web: aiohttp.ClientSession, name: str, security: str, kind: float = 0.0) -> bool:
        """One question; whether it was answered. What is neither right nor 503 is noted as wrong."""
        segment = quote(security, safe="")
        path = f"/api/triggers/{segment}"
        if kind > 0.98:
            path = "/api/triggers?limit=10000"
        elif security in (".", "..") or kind > 0.8:
            path = f"/api/triggers?security_id={segment}"
        elif kind > 0.7 and "/" not in security:
            path = f"/table/triggers/{segment}/"
        try:
            async with web.get(aiohttp.client.URL(self.url(name) + path, encoded=True)) as response:
                status, headers = response.status, response.headers
                body = await response.json(content_type=None)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            self.answers["no connection"] += 1  # the worker is down, or only starting
            return False
        self.answers[str(status)] += 1
        if status == 503:
            if "Retry-After" not in headers:
                self.wrong.append(f"{name} {path}: 503 without Retry-After")
            return False
        right = self._expected[security]
        if "limit=" in path:
            good = status == 200 and {row["security_id"]: row for row in body} == self._expected
        elif path.startswith("/table/"):
            good = status == 200 and f'"job_id":{right["in_flight"]["job_id"]},' in body
        elif "security_id=" in path:
            good = status == 200 and body == [right]
        else:
            good = status == 200 and body == right
        if not good:
            self.wrong.append(f"{name} {path}: {status} {str(body)[:120]}")
        return True

    async def ask_everyone_everything(self) -> None:
        """Every security of every worker, until answered."""
        async with aiohttp.ClientSession() as web, asyncio.timeout(120):

            async def ask_all(name: str, securities: Sequence[str]) -> None:
                for security in securities:
                    while not await self.ask(web, name, security):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)

            parts = [SECURITIES[first::4] for first in range(4)]
            await asyncio.gather(*(ask_all(name, part) for name in self.workers for part in parts))


@asynccontextmanager
async def group(
    kafka: str, dsn: str, folder: Path, program: Sequence[str] = (sys.executable, "-m", "tidemark")
) -> AsyncIterator[Group]:
    """A first worker, and a job in flight for every security."""
    prefix = f"k{uuid.uuid4().hex[:8]}-"
    settings = load_named(
        broker_url=kafka,
        database_url=dsn,
        data_dir=folder / prefix,
        topic_prefix=prefix,
        internal_partitions=PARTITIONS,
        input_partitions=1,
        session_timeout_seconds=6,
        repair_after_seconds=10_000,
    )
    rest = Stack(settings, roles=["intake", "books"])
    await rest.start()
    pool = await connect_pool(dsn, size=1)
    topology = Topology(rest, pool)
    found = Group(topology, folder / prefix, program)
    try:
        await found.join("first")
        await topology.send([("business-dates", {"business_date": "2025-01-10"})])
        await topology.send(
            [
                ("prices", {"security_id": s, "price_date": "2025-01-05", "price": n + 1})
                for n, s in enumerate(SECURITIES)
            ]
        )
        await found.learn()
        yield found
    finally:
        await pool.close()
        for stack in found.workers.values():
            await stack.stop()
        await rest.stop()


async def test_every_worker_is_right_about_every_security_while_workers_come_go_and_freeze(
    kafka: str, postgres: PostgresServer, empty_database: str, folder: Path
) -> None:
    async with group(kafka, empty_database, folder) as found:
        async with found.asked():
            await found.join("second")
            await found.join("third")
            found.signal("second", signal.SIGKILL)  # its supervisor starts it again
            await _changed(found, "second")
            found.signal("first", signal.SIGSTOP)  # a zombie: past its session, then awake
            await until(lambda: has_members(found, 2), "the zombie out of its group")
            found.signal("first", signal.SIGCONT)
            await _changed(found, "first")
            await found.workers["third"].stop()
            await _changed(found, "first")
        await found.join("third")
        await found.ask_everyone_everything()
        print(dict(found.answers))
        assert not found.wrong, found.wrong[:10]
        assert found.answers["200"] > 3 * len(SECURITIES)
        async with aiohttp.ClientSession() as web:
            holders = {(await _route(web, found, security)) for security in SECURITIES[:200]}
        assert holders == {found.url(name) for name in found.workers}  # each must ask others for some


@pytest.mark.timeout(600)
async def test_the_questions_notice_when_the_guard_is_off(
    kafka: str, postgres: PostgresServer, empty_database: str, folder: Path
) -> None:
    program = (sys.executable, "-m", "tests.web.unguarded")
    async with group(kafka, empty_database, folder, program) as found:
        async with found.asked():
            async with asyncio.timeout(240):  # one worker that joins is enough, mostly
                number = 0
                while not found.wrong:
                    number += 1
                    await found.join(f"joined {number}")
        print(found.wrong[:3])


async def has_members(found: Group, count: int) -> bool:
    """Whether the broker knows so many workers of the group, and none is joining or leaving."""
    settings = found.workers["first"].settings
    group = settings.group("triggers")
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    described: Any = await asyncio.to_thread(admin.describe_consumer_groups([group])[group].result, 30)
    return described.state == ConsumerGroupState.STABLE and len(described.members) == count


async def _changed(found: Group, name: str) -> None:
    """Until the worker is ready again, seen from outside."""
    async with aiohttp.ClientSession() as web, asyncio.timeout(90):
        while True:
            try:
                async with web.get(f"{found.url(name)}/readyz") as response:
                    if response.status == 200 and await found.ask(web, name, SECURITIES[0]):
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


async def _route(web: aiohttp.ClientSession, found: Group, security: str) -> str:
    async with web.get(f"{found.url('first')}/router/triggers/{security}/") as response:
        url: str = await response.json(content_type=None)
        return url
