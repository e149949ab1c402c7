"""A worker that is expected not to start: what it says, and that it never was ready."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from deploy.local.ports import LOOPBACK, http_status
from streams.app import free_port
from streams.settings import Settings

_LONGEST_SECONDS = 120


async def refused(settings: Settings, role: str, folder: Path) -> str:
    """The one line that it prints before it exits with 1."""
    port = free_port(LOOPBACK)
    settings = settings.model_copy(update={"data_dir": folder, "web_port": port})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidemark", "worker", role),
        env={**settings.environment(), "PYTHONPATH": ":".join(filter(None, sys.path))},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    ended = asyncio.ensure_future(process.communicate())
    async with asyncio.timeout(_LONGEST_SECONDS):
        while not ended.done():
            assert await http_status(LOOPBACK, port, "/readyz") != 200
            await asyncio.sleep(0.05)
    out, err = ended.result()
    assert process.returncode == 1, err.decode()
    assert out == b""
    (line,) = err.decode().splitlines()
    return line
