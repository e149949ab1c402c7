"""Child processes that do not outlive the stack, and processes of an earlier run."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_CLOCK_SLACK = 2.0  # seconds; a process's start time is rounded and moves when the clock is set
_POLL = 0.05
_LOG_LIMIT = 8_000_000  # bytes; a larger log is set aside, and replaces the one set aside before
_KILL_WAIT = 10.0


@dataclass(frozen=True)
class Command:
    """How to start a process and how to end it. `user` is the account to run as, None: ours."""

    argv: Sequence[str]
    log: Path
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    orphan_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 15.0


@dataclass(frozen=True)
class Identity:
    """A process for certain: its id, and when it started (seconds since 1970), since ids are used again."""

    pid: int
    started: float

    def running(self) -> psutil.Process | None:
        """The process, if it still is the same one and not merely waiting to be reaped."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _CLOCK_SLACK
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def identify(pid: int) -> Identity:
    """The identity of a process that runs now; of one just gone, an identity that is never running."""
    try:
        return Identity(pid, psutil.Process(pid).create_time())
    except psutil.Error:
        return Identity(pid, 0.0)


def spawn(command: Command) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output appended to its log.

    On Linux it also ends when the calling thread does, so call this from a thread that lives as long as the stack.
    Raises OSError when the program cannot be started.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    set_large_log_aside(command.log)
    with command.log.open("ab") as log:
        return subprocess.Popen(
            list(command.argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=command.cwd,
            env={**os.environ, **command.env},
            start_new_session=True,
            preexec_fn=_die_with_parent(command.orphan_signal),
            **_account(command.user),
        )


async def run(command: Command, timeout: float) -> int:
    """Run a process to its end and return its exit code; it is killed on timeout (TimeoutError) and cancellation."""
    process = spawn(command)
    try:
        async with asyncio.timeout(timeout):
            while process.poll() is None:  # noqa: ASYNC110 - a process has no event to wait for
                await asyncio.sleep(_POLL)
    finally:
        kill(process)
    return process.returncode


async def stop(process: subprocess.Popen[bytes], command: Command) -> None:
    """End a process in its own way, or by force after its grace; returns when it is gone."""
    if process.poll() is None:
        process.send_signal(command.stop_signal)
    deadline = time.monotonic() + command.grace_seconds
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL)
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started in its session, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end(identity: Identity, stop_signal: signal.Signals, grace_seconds: float) -> bool:
    """End a process that is not our child, by force after the grace; False when there was none to end."""
    process = identity.running()
    if process is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(stop_signal)
        process.send_signal(signal.SIGCONT)
    if not _gone(identity, grace_seconds):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        _gone(identity, _KILL_WAIT)
    return True


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, shortened; empty when there is none."""
    return next((line.strip()[:200] for line in reversed(tail(log)) if line.strip()), "")


def tail(log: Path, size: int = 8192) -> list[str]:
    """The lines in the last `size` bytes of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def set_large_log_aside(log: Path) -> None:
    """Copy a log that is too large to its `.log.1` and empty it, under a process that may be writing to it.

    A line written between the two is lost: the process keeps its file, so the file cannot be replaced.
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LOG_LIMIT:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


def _gone(identity: Identity, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while identity.running() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _die_with_parent(orphan_signal: signal.Signals) -> Callable[[], None] | None:
    if _PRCTL is None:
        return None
    prctl = _PRCTL

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(orphan_signal))

    return ask


def _account(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    import pwd

    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
