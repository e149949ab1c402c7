"""Bookings, prices, dates, resets, valuations and retention of the same few keys at once, each through its own path.

`CONCURRENCY_SECONDS=300 pytest tests/integration/test_concurrency_sql.py` runs it for longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from sinks import calendar, positions, prices, resets, retention
from sinks.batches import Batch, Record
from sinks.database import Connection, Pool, connect_pool, is_transient
from sinks.offsets import Claim, Offsets
from sinks.valuation import Valuation
from streams import records
from tests import scenarios
from tests.engine import Engine
from tidemark.audit import audit_books

_SECONDS = float(os.environ.get("CONCURRENCY_SECONDS", "20"))
_PARTITIONS = 4


@dataclass(frozen=True)
class Sent:
    offset: int
    value: bytes | None
    key: bytes | None = None


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await connect_pool(database, size=12)
    yield pool
    await pool.close()


class Partition:
    """One partition of an input topic and the worker that has claimed it."""

    def __init__(self, pool: Pool, topic: str, number: int, chance: random.Random) -> None:
        async def get() -> Pool:
            return pool

        self._partition = (topic, number)
        self._offsets = Offsets(get, "intake", lambda: False)
        self._chance = chance
        self._claim: Claim | None = None
        self._next = 0
        self.waiting: list[dict[str, Any]] = []

    async def take(self) -> int:
        """One batch of what waits, through the exactly-once sink."""
        if self._claim is None:
            self._claim = (await self._offsets.claim({self._partition: 0}))[self._partition]
        size = self._chance.choice([1, 2, 10, 40])
        values = [json.dumps(record).encode() for record in self.waiting[:size]]
        del self.waiting[:size]
        if values:
            sent = [Sent(self._next + n, value) for n, value in enumerate(values)]
            batch = Batch(*self._partition, self._claim.epoch, self._next, sent)
            await self._offsets.apply(batch, self._effect, self._refuse)
            self._next += len(values)
        return len(values)

    async def _effect(self, connection: Connection, batch: Sequence[Record]) -> None:
        match self._partition[0]:
            case "business-dates":
                await calendar.apply(connection, [records.decode_business_date(r.value) for r in batch])
            case "prices":
                await prices.apply(connection, [records.decode_price(r.value) for r in batch])
            case "transactions":
                numbered = [(r.offset, records.decode_transaction(r.value)) for r in batch]
                await positions.apply(connection, numbered, "FIFO", 20)

    async def _refuse(self, connection: Connection, record: Record, detail: str) -> None:
        raise AssertionError(detail)


@pytest.mark.timeout(_SECONDS + 300)
async def test_everything_at_once_on_the_same_keys(pool: Pool, database: str, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(2025)
    topics = {"business-dates": 1, "prices": 2, "transactions": _PARTITIONS}
    partitions = {topic: [Partition(pool, topic, n, chance) for n in range(count)] for topic, count in topics.items()}
    engine = Engine(pool, "FIFO")
    done, retried = Counter[str](), Counter[str]()
    feeding = True

    async def forever(name: str, work: Callable[[], Awaitable[int]]) -> None:
        while feeding:
            found = 0
            try:
                done[name] += (found := await work())
            except Exception as error:
                if not is_transient(error):
                    raise
                retried[f"{name}: {type(error).__name__}"] += 1  # as the workers do
            await asyncio.sleep(0 if found else 0.01)

    async def reset() -> int:
        jobs, running = list(engine.jobs), list(engine.running)
        try:
            await engine.relay()
            jobs = list(engine.jobs)
            await engine.open_jobs()
            running, jobs = list(engine.running), []
            return await engine.reset_chunk(2) if engine.running else 0
        except resets.JobMoved:
            raise AssertionError("only one task resets") from None
        except Exception:
            engine.jobs.clear()
            engine.jobs.extend(jobs)
            engine.running[:] = running
            raise

    async def retire() -> int:
        await asyncio.sleep(0.05)
        async with pool.acquire() as connection:
            return await retention.purge_history(connection, timedelta(), 20)

    async def value(valuation: Valuation) -> int:
        return (await valuation.pass_once()).keys

    def all_busy() -> bool:
        return min(done[name] for name in (*topics, "valued", "reset", "retired")) > 20

    async def feed() -> None:
        nonlocal feeding
        end, seed = time.monotonic() + _SECONDS, 0
        while time.monotonic() < end or not all_busy():
            for topic, record in scenarios.generate(seed, events=600, portfolios=3, securities=2):
                if topic == "transactions":
                    record["transaction_id"] += f"-{seed}"
                chance.choice(partitions[topic]).waiting.append(record)
            seed += 1
            while sum(len(p.waiting) for of_topic in partitions.values() for p in of_topic) > 300:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        while any(p.waiting for of_topic in partitions.values() for p in of_topic):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        feeding = False

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(feed())
        for topic, of_topic in partitions.items():
            for partition in of_topic:
                tasks.create_task(forever(topic, partition.take))
        for keys in (1, 4):
            valuation = Valuation(pool, keys)
            tasks.create_task(forever("valued", lambda valuation=valuation: value(valuation)))
        tasks.create_task(forever("reset", reset))
        tasks.create_task(forever("retired", retire))
    await engine.drain()
    deadlocks = caplog.text.count("DeadlockDetectedError") + sum(retried.values())
    print(dict(done), dict(retried), f"{deadlocks} deadlocks, all retried")
    assert all_busy()
    audit = await audit_books(database, "FIFO")
    assert (audit.differences, audit.waiting) == ([], [])
    assert await pool.fetchval("select count(*) from corrections where right_at is null") == 0
    assert await pool.fetchval("select max(epoch) from position_state") > 20
