"""`intake` workers, timed from outside: by the offsets that they commit in Postgres."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from deploy.local.stack import Stack
from sinks.database import Connection
from streams.settings import Settings
from tests.bench.bench_consume import forget_offsets

_LONGEST_SECONDS = 300.0


async def through_intake(settings: Settings, connection: Connection, topic: str, count: int) -> float:
    """Records per second from the first committed batch on, so that the worker's start does not count."""
    await forget_offsets(settings)
    stack = _worker(settings)
    starting = asyncio.create_task(stack.start())
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            while not (first := await _passed(connection, settings, topic)):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            started = time.perf_counter()
            while (last := await _passed(connection, settings, topic)) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return (last - first) / (time.perf_counter() - started)
    finally:
        await starting
        await stack.stop()


async def through_ready_workers(
    settings: Settings, connection: Connection, topic: str, workers: int, send: Callable[[], int]
) -> float:
    """Records per second from the sending on, by so many workers that are ready before; send: returns how many."""
    before = await _passed(connection, settings, topic)
    async with AsyncExitStack() as running:
        for _ in range(workers):
            stack = _worker(settings)
            await stack.start()
            running.push_async_callback(stack.stop)
        started = time.perf_counter()
        count = await asyncio.to_thread(send)
        async with asyncio.timeout(_LONGEST_SECONDS):
            while await _passed(connection, settings, topic) < before + count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return count / (time.perf_counter() - started)


def _worker(settings: Settings) -> Stack:
    own = settings.model_copy(update={"data_dir": Path(f"{settings.data_dir}-{uuid.uuid4().hex[:8]}")})
    return Stack(own, roles=["intake"])


async def _passed(connection: Connection, settings: Settings, topic: str) -> int:
    found: int = await connection.fetchval(
        "select coalesce(sum(next_offset), 0)::bigint from kafka_offsets where consumer_group = $1 and topic = $2",
        settings.group("intake"),
        settings.topic(topic),
    )
    return found
