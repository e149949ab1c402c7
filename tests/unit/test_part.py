"""A supervised process: whether it serves is true of the process there is, not of when it was last looked at."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from deploy.local import part as part_module
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


async def test_a_process_that_stands_still_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it still says that it is ready: that only asks whether the database answers."""
    monkeypatch.setattr(part_module, "_STANDSTILL_SECONDS", 0.2)
    monkeypatch.setattr(part_module, "_LOOK_AGAIN", 0.05)
    standing: set[int | None] = set()

    async def serves() -> bool:
        return True

    async def is_alive() -> bool:
        return part.pid not in standing

    part = Part("sleeper", lambda: Command(("sleep", "60"), tmp_path / "log"), serves, lambda: None, is_alive)
    await part.start(timeout=10)
    try:
        first = part.pid
        await asyncio.sleep(0.5)
        assert part.pid == first, "it lives as long as it says that it does"
        standing.add(first)
        async with asyncio.timeout(20):
            while part.restarts == 0 or not part.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert part.pid != first
        assert part.last_exit == -signal.SIGKILL
    finally:
        await part.stop()
