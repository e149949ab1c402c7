"""The trigger agent and its table: runs of events beside one event at a time, as Faust takes them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from deploy.local.stack import Stack
from streams import topics
from tests.bench.harness import Bench, Work
from tests.bench.sending import send
from tests.exported import exported
from tests.topology import draw

_PARTITIONS = 1
_WAIT_SECONDS = 300.0
_COUNTED = 'trigger_events_total{kind="trigger"}'
Securities = Callable[[int], str]


async def run(bench: Bench) -> None:
    """Triggers of one security that has a job in flight, and of a new security each, from the topic to the table."""
    async with AsyncExitStack() as workers:
        runs, single = await asyncio.gather(
            workers.enter_async_context(_worker(bench, "tidemark")),
            workers.enter_async_context(_worker(bench, "tests.chaos.sabotage", "one_by_one")),
        )
        for what, name in (("of one security", lambda _: "S"), ("of as many securities", lambda n: f"T{n}")):
            await bench.compare(
                f"triggers {what}",
                "triggers/s",
                _Bursts(runs, name, bench.size(20_000, 500)).rate,
                ("one at a time", _Bursts(single, name, bench.size(20_000, 500)).rate),
            )


@asynccontextmanager
async def _worker(bench: Bench, *module: str) -> AsyncIterator[Stack]:
    async with bench.database() as dsn:
        settings = await bench.settings(dsn, internal_partitions=_PARTITIONS)
        stack = Stack(settings, roles=["triggers"], program=[sys.executable, "-m", *module])
        await stack.start()
        await draw(settings.dsn)
        try:
            yield stack
        finally:
            await stack.stop()


class _Bursts:
    """One worker's rounds: each sends triggers at once, and waits until the worker has taken them all."""

    def __init__(self, stack: Stack, security: Securities, count: int) -> None:
        self._stack = stack
        self._security = security
        self._count = count

    @property
    def rate(self) -> Work:
        """Triggers per second, the last run's table writes not quite included."""

        async def once() -> float:
            before = await self._taken()
            started = time.perf_counter()
            await asyncio.to_thread(self._send, int(before))
            async with asyncio.timeout(_WAIT_SECONDS):
                while await self._taken() < before + self._count:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            return self._count / (time.perf_counter() - started)

        return once

    async def _taken(self) -> float:
        return (await exported(self._stack, "triggers")).get(_COUNTED, 0)

    def _send(self, first: int) -> None:
        send(self._stack.settings, topics.TRIGGERS, map(self._trigger, range(first, first + self._count)))

    def _trigger(self, number: int) -> tuple[str, bytes]:
        security = self._security(number)
        value = {"security_id": security, "earliest_impacted_date": "2025-01-05", "seq": number + 1, "reason": "price"}
        return security, json.dumps(value).encode()
