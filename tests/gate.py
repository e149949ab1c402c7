"""Databases of tests have no worker that confirms them: their gate is opened by hand."""

from __future__ import annotations

from sinks import generation
from sinks.database import connect


async def open_gate(dsn: str) -> None:
    """Let writes in, as if a worker had seen that nothing was lost."""
    connection = await connect(dsn)
    try:
        await generation.open_gate(connection, 0)
    finally:
        await connection.close()
