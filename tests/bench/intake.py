"""One `intake` worker, timed from outside: by the offsets that it commits in Postgres."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path

from deploy.local.stack import Stack
from sinks.database import Connection
from streams.settings import Settings
from tests.bench.bench_consume import forget_offsets

_LONGEST_SECONDS = 300.0


async def through_intake(settings: Settings, connection: Connection, topic: str, count: int) -> float:
    """Records per second from the first committed batch on, so that the worker's start does not count."""
    await forget_offsets(settings)
    stack = Stack(
        settings.model_copy(update={"data_dir": Path(f"{settings.data_dir}-{uuid.uuid4().hex[:8]}")}), roles=["intake"]
    )
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


async def _passed(connection: Connection, settings: Settings, topic: str) -> int:
    found: int = await connection.fetchval(
        "select coalesce(sum(next_offset), 0)::bigint from kafka_offsets where consumer_group = $1 and topic = $2",
        settings.group("intake"),
        settings.topic(topic),
    )
    return found
