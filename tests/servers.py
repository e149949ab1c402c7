"""An embedded server of a test's or a benchmark's own, kept alive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.local.kafka import KafkaServer
from deploy.local.part import Part
from deploy.local.postgres import PostgresServer

_START_SECONDS = 120.0


@asynccontextmanager
async def serving(name: str, server: PostgresServer | KafkaServer) -> AsyncIterator[Part]:
    """The server's process, started again at the same address whenever it ends."""
    await server.prepare()
    part = Part(name, server.launch, server.ready, lambda: None)
    try:
        await part.start(_START_SECONDS)
        server.published = True
        yield part
    finally:
        await part.stop()
