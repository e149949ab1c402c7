"""Two `triggers` workers, each with a copy of the other's partitions: one is killed, and the other has what it held."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from streams import topics
from tests.exported import exported
from tests.integration.test_table_restore import KEYS, ROUNDS, Entries, entries, fill, log_of, restores, stack_with
from tests.topology import draw, settings_for, until


async def has_its_copies(stack: Stack) -> bool:
    """Since its partitions were assigned it has begun to keep copies, has become ready, and the copies lack nothing."""
    since = log_of(stack).rpartition("Executing _on_partitions_assigned")[2]
    is_ready = "Starting standby partitions" in since and "Worker ready" in since
    return is_ready and (await exported(stack, "triggers"))["table_standby_remaining_records"] == 0


class Pair:
    """Two workers of one group and what the table holds: seq in flight by security."""

    def __init__(self, kafka: str, dsn: str, folder: Path, *changes: str) -> None:
        prefix = f"t{uuid.uuid4().hex[:8]}-"
        settings = [
            settings_for(kafka, dsn, folder, topic_prefix=prefix, data_dir=folder / f"{prefix}{name}")
            for name in ("first", "second")
        ]
        self._settings = settings[0]
        self.first, self.second = (stack_with(each, *changes) for each in settings)
        self._held: Entries = {}

    async def start(self) -> None:
        """With a changelog of some length, until each has its copies."""
        self._held = await fill(self._settings)
        await self.first.start()
        await draw(self._settings.dsn)
        await self.second.start()
        await self.copied(self.first, self.second)

    async def stop(self) -> None:
        await asyncio.gather(self.first.stop(), self.second.stop())

    async def copied(self, *stacks: Stack) -> None:
        for stack in stacks:
            await until(lambda stack=stack: has_its_copies(stack), "copies of the other's partitions")

    async def send(self, count: int) -> None:
        """Triggers of securities that have no entry yet."""
        producer = AIOKafkaProducer(bootstrap_servers=self._settings.bootstrap_servers)
        await producer.start()
        for seq in range(1, count + 1):
            security = f"NEW{seq:05}"
            trigger = {"security_id": security, "earliest_impacted_date": "2025-01-01", "seq": seq, "reason": "price"}
            topic = self._settings.topic(topics.TRIGGERS)
            await producer.send(topic, json.dumps(trigger).encode(), key=security.encode())
            self._held[security] = seq
        await producer.stop()

    async def shown(self, stack: Stack) -> None:
        """Until the worker lists what the table holds."""

        async def is_shown() -> bool:
            try:
                return await entries(stack) == self._held
            except (aiohttp.ClientError, AssertionError):
                return False

        await until(is_shown, "all entries")

    def end(self, stack: Stack, how: signal.Signals) -> None:
        """It stays away."""
        worker = stack.workers["triggers"]
        assert worker.pid
        worker.hold(600)
        os.kill(worker.pid, how)


@pytest.fixture
async def pair(kafka: str, empty_database: str, folder: Path) -> AsyncIterator[Pair]:
    pair = Pair(kafka, empty_database, folder, "busy_copies")
    try:
        await pair.start()
        yield pair
        assert pair.first.restarts == 0
    finally:
        await pair.stop()


async def test_the_partitions_of_a_killed_worker_are_taken_over_from_the_copy(pair: Pair) -> None:
    await pair.send(300)
    await pair.shown(pair.first)
    await pair.copied(pair.first, pair.second)
    before = len(restores(log_of(pair.first)))
    pair.end(pair.second, signal.SIGKILL)

    async def taken_over() -> bool:
        return len(restores(log_of(pair.first))) > before

    await until(taken_over, "the other's partitions")
    await pair.shown(pair.first)
    restored, whole = restores(log_of(pair.first))[-1]
    assert whole >= KEYS * ROUNDS + 300
    assert restored < whole / 100


async def test_a_copy_that_is_filled_while_its_worker_runs_is_whole(pair: Pair) -> None:
    """The worker was frozen past its session and has missed a lot; then the other one is killed."""
    worker = pair.first.workers["triggers"]
    assert worker.pid
    before = log_of(pair.first).count("Starting standby partitions")
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        await pair.shown(pair.second)
        await pair.send(2_000)
        await pair.shown(pair.second)
    finally:
        os.kill(worker.pid, signal.SIGCONT)

    async def back() -> bool:
        return log_of(pair.first).count("Starting standby partitions") > before

    await until(back, "its return into the group")
    await pair.copied(pair.first)
    pair.end(pair.second, signal.SIGKILL)
    await pair.shown(pair.first)
