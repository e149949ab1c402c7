"""A stack in a process of its own, in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.local import state
from deploy.local.errors import StackError
from deploy.local.process import last_line

_START_SECONDS = 600.0  # the first start fetches Kafka
_STOP_SECONDS = 90.0


def start(folder: Path, environment: Mapping[str, str], on_step: Callable[[str], None]) -> state.StackState:
    """Start `tidemark up` in the background and return when it is ready. environment: settings besides DATA_DIR.

    Raises StackError with the reason when it does not start.
    """
    if state.DataDirLock.held(folder):
        raise StackError(state.occupied(folder))
    log = folder / "logs" / "stack.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        # For its owner only: it shows the database's address, password included.
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StackError(f"TIDEMARK_DATA_DIR: cannot use {folder}: {error.strerror}") from error
    with os.fdopen(output, "wb") as opened:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidemark", "up"],
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment, "TIDEMARK_DATA_DIR": str(folder)},
        )
    return _await_ready(process, folder, log, on_step)


def stop(folder: Path) -> bool:
    """Stop the stack of the folder; False when none runs."""
    return state.shut_down(folder, _STOP_SECONDS)


def _await_ready(
    process: subprocess.Popen[bytes], folder: Path, log: Path, on_step: Callable[[str], None]
) -> state.StackState:
    deadline = time.monotonic() + _START_SECONDS
    try:
        while True:
            if process.poll() is not None:
                raise StackError(_why_it_ended(process.returncode, log))
            found = state.read(folder)
            if found and found.ready and found.supervisor.pid == process.pid:
                return found
            if time.monotonic() > deadline:
                raise StackError(f"the stack is not ready after {_START_SECONDS:.0f} s: see {log}")
            on_step(last_line(log) or "starting")
            time.sleep(0.1)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        raise


def _why_it_ended(code: int, log: Path) -> str:
    if code == 0:
        return "the stack was stopped while it started"
    return last_line(log).removeprefix("Error: ") or f"the stack did not start: see {log}"
