"""A supervised process: whether it serves is true of the process there is, not of when it was last looked at."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from deploy.local.part import Part
from deploy.local.process import Command


async def test_a_process_that_is_gone_is_not_ready(tmp_path: Path) -> None:
    async def serves() -> bool:
        return True

    part = Part("sleeper", lambda: Command(("sleep", "60"), tmp_path / "log"), serves, lambda: None)
    await part.start(timeout=10)
    try:
        pid = part.pid
        assert part.ready
        assert pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - the watch is not to look meanwhile
        assert not part.ready
        assert part.pid is None
    finally:
        await part.stop()


async def test_a_process_that_is_held_comes_back_when_it_is_let_go(tmp_path: Path) -> None:
    async def serves() -> bool:
        return True

    part = Part("sleeper", lambda: Command(("sleep", "60"), tmp_path / "log"), serves, lambda: None)
    await part.start(timeout=10)
    try:
        first = part.pid
        assert first
        part.hold(600)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(60):
            while part.restarts == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert part.pid is None
            part.let_go()
            while not part.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert part.pid != first
    finally:
        await part.stop()
