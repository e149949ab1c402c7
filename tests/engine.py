"""The engine without Kafka: every sink on a real Postgres, the outbox's triggers, jobs and statuses passed by hand.

For tests that want to decide in which order things happen.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from sinks import calendar, corrections, model, outbox, positions, prices, resets
from sinks.database import connect_pool
from sinks.valuation import Pass, Valuation
from streams import records
from tables import triggers


class Engine:
    """One of each worker, acting only when told to."""

    def __init__(self, pool: asyncpg.Pool, method: model.CostBasisMethod = "FIFO", keys: int = 1_000) -> None:
        self.pool = pool
        self.replay_rows = 10_000
        self.method = method
        self.debounce: corrections.Debounce | None = None
        self.valuation = Valuation(pool, keys)
        self.table: dict[str, triggers.Entry] = {}
        self.jobs: deque[model.Job] = deque()
        self.running: list[resets.OpenJob] = []
        self.published: list[tuple[str, dict[str, Any]]] = []

    @classmethod
    async def on(cls, dsn: str, method: model.CostBasisMethod = "FIFO", keys: int = 1_000) -> Engine:
        """An engine on the database."""
        return cls(await connect_pool(dsn, size=4), method, keys)

    async def take(self, topic: str, batch: Sequence[dict[str, Any]]) -> None:
        """One transaction of the topic's sink."""
        values = [json.dumps(record).encode() for record in batch]
        async with self.pool.acquire() as connection, connection.transaction():
            match topic:
                case "business-dates":
                    await calendar.apply(connection, [records.decode_business_date(v) for v in values])
                case "prices":
                    await prices.apply(connection, [records.decode_price(v) for v in values], self.debounce)
                case "transactions":
                    decoded = [records.decode_transaction(v) for v in values]
                    await positions.apply(connection, list(enumerate(decoded)), self.method, self.replay_rows)

    async def relay(self) -> int:
        """Pass on what waits in the outbox; the trigger agent hears it at once."""
        async with self.pool.acquire() as connection:
            events = (await outbox.read(connection, 100_000, 2**30)).events
            for event in events:
                assert event.value is not None
                self._hear(event.topic, json.loads(event.value), event.value)
            await outbox.acknowledge(connection, events)
        return len(events)

    def _hear(self, topic: str, event: dict[str, Any], value: bytes) -> None:
        self.published.append((topic, event))
        security, now = event["security_id"], datetime.now(UTC)
        if topic == "reprocessing-triggers":
            trigger = msgspec.json.decode(value, type=triggers.Trigger)
            self._act(security, triggers.on_trigger(self.table.get(security), trigger, now))
        elif topic == "reprocessing-status":
            status = msgspec.json.decode(value, type=triggers.Status)
            self._act(security, triggers.on_status(self.table.get(security), status, now))

    def _act(self, security: str, decision: triggers.Decision) -> None:
        if decision.publish:
            self.jobs.append(model.Job(**msgspec.structs.asdict(decision.publish)))
        if decision.entry is None:
            self.table.pop(security, None)
        else:
            self.table[security] = decision.entry

    async def reissue(self) -> int:
        """What the `books` role does now and then: triggers that have settled, and repairs."""
        async with self.pool.acquire() as connection, connection.transaction():
            return len(await corrections.reissue(connection, 30))

    async def open_jobs(self) -> None:
        """The watermark sink reads all job records there are."""
        if self.jobs:
            jobs = [self.jobs.popleft() for _ in range(len(self.jobs))]
            async with self.pool.acquire() as connection, connection.transaction():
                opened = await resets.open_jobs(connection, jobs)
            known = {job.job_id for job in self.running}
            self.running += [job for job in opened if not job.ended and job.job_id not in known]

    async def reset_chunk(self, scan: int) -> int:
        """One chunk of the job whose turn it is; returns keys reset."""
        job = self.running.pop(0)
        async with self.pool.acquire() as connection, connection.transaction():
            chunk = await resets.reset_chunk(connection, job, scan)
        if not chunk.job.ended:
            self.running.append(chunk.job)
        return chunk.keys_reset

    async def value(self) -> Pass:
        """One pass of the valuation."""
        return await self.valuation.pass_once()

    async def drain(self, scan: int = 3) -> None:
        """Until nothing is left to do."""
        while True:
            busy = await self.relay()
            await self.open_jobs()
            while self.running:
                busy += 1
                await self.reset_chunk(scan)
            done = await self.value()
            if not busy and done == Pass():
                return

    async def do_something(self, chance: random.Random) -> None:
        """Any one step."""
        match chance.randrange(4):
            case 0:
                await self.relay()
            case 1:
                await self.open_jobs()
            case 2 if self.running:
                await self.reset_chunk(chance.choice([1, 2, 5]))
            case _:
                await self.value()
