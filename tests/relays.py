"""Relays that run beside a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from streams.relay import Relay
from streams.settings import Settings

_STOP_SECONDS = 30


@asynccontextmanager
async def relays(settings: Settings, count: int = 1, silent_seconds: float = 60) -> AsyncIterator[None]:
    """So many of them; afterwards each must end in time, and without an error."""
    stopping = False
    tasks = [asyncio.create_task(Relay(settings, lambda: stopping, silent_seconds).run()) for _ in range(count)]
    try:
        yield
    finally:
        stopping = True
        async with asyncio.timeout(_STOP_SECONDS):
            await asyncio.gather(*tasks)
