"""What a data directory knows of its stack: who holds it, its addresses, and its processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.errors import StackError
from deploy.local.process import Identity, end, identify

STATE_FILE = "stack.json"  # streams.settings reads the addresses from it
LOCK_FILE = "stack.lock"
_ORPHAN_GRACE = 10.0


@dataclass(frozen=True)
class ProcessState:
    """A process of the stack; `signal` ends it cleanly."""

    name: str
    pid: int
    started: float
    signal: int
    ready: bool = False
    restarts: int = 0
    last_exit: int | None = None


@dataclass(frozen=True)
class WorkerState:
    """A worker, as `tidemark status --json` lists it. `pid` is None between an exit and the restart."""

    role: str
    name: str
    pid: int | None
    web_url: str
    ready: bool
    restarts: int
    last_exit: int | None = None


@dataclass(frozen=True)
class StackState:
    """The content of stack.json. Processes are in the order they were started."""

    supervisor: Identity
    ready: bool = False
    broker_url: str | None = None
    database_url: str | None = None
    web_url: str | None = None
    workers: list[WorkerState] = field(default_factory=list)
    processes: list[ProcessState] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the supervisor runs."""
        return self.supervisor.running() is not None


class DataDirLock:
    """Holds a data directory for this process; the system frees it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Create the directory if missing and hold it. Raises StackError when another stack does."""
        try:
            _create(self._folder)
            descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StackError(f"TIDEMARK_DATA_DIR: cannot use {self._folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise StackError(occupied(self._folder)) from None
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; the file stays, since removing it would let two processes lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def held(folder: Path) -> bool:
        """Whether some process holds the directory."""
        try:
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False


def occupied(folder: Path) -> str:
    """The line for a directory that another stack holds."""
    state = read(folder)
    holder = f" (process {state.supervisor.pid})" if state else ""
    return f"a stack already runs in {folder}{holder}: stop it with `tidemark down`, or set another TIDEMARK_DATA_DIR"


def write(folder: Path, state: StackState) -> None:
    """Replace stack.json in one step, readable by its owner only: it carries the database's password."""
    fresh = folder / (STATE_FILE + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(state), file, indent=1)
    fresh.replace(folder / STATE_FILE)


def read(folder: Path) -> StackState | None:
    """What stack.json says, whether or not that stack still runs; None when there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        found["supervisor"] = Identity(**found["supervisor"])
        found["workers"] = [WorkerState(**worker) for worker in found["workers"]]
        found["processes"] = [ProcessState(**process) for process in found["processes"]]
        return StackState(**found)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove(folder: Path) -> None:
    """Forget the stack: nothing of it runs any more."""
    (folder / STATE_FILE).unlink(missing_ok=True)


def end_orphans(folder: Path) -> int:
    """End what a supervisor that was killed left running, last started first; returns how many there were.

    Only for a directory whose lock is free or ours.
    """
    state = read(folder)
    if state is None:
        return 0
    ended = 0
    for process in reversed(state.processes):
        ended += end(Identity(process.pid, process.started), signal.Signals(process.signal), _ORPHAN_GRACE)
    remove(folder)
    return ended


def shut_down(folder: Path, timeout: float) -> bool:
    """Stop the stack of a directory and wait until all of it is gone; False when none ran."""
    state = read(folder)
    running = state is not None and end(state.supervisor, signal.SIGTERM, timeout)
    deadline = time.monotonic() + timeout
    while DataDirLock.held(folder):
        if time.monotonic() > deadline:
            raise StackError(f"the stack in {folder} does not stop")
        time.sleep(0.1)
    return end_orphans(folder) > 0 or running


def this_process() -> Identity:
    """The identity of the calling process."""
    return identify(os.getpid())


def _create(folder: Path) -> None:
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if created and os.geteuid() == 0:
        # Postgres then runs as another user, who must be able to pass through (not to list).
        folder.chmod(0o711)
