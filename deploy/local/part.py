"""One supervised process of the stack: started, watched, started again when it dies, ended in its own way."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from deploy.local.errors import StackError
from deploy.local.process import Command, identify, last_line, set_large_log_aside, spawn, stop
from deploy.local.state import ProcessState

_POLL = 0.1
_LOOK_AGAIN = 2.0  # seconds between looks at whether a part that was ready still is
_STANDSTILL_SECONDS = 60.0  # of a process that was ready once and does not say that it is alive
_EXITS_BEFORE_READY = 5
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 10.0
_STEADY_SECONDS = 10.0  # after so long a life the backoff begins anew


class Part:
    """A process by name. launch: the command for the next start; is_ready: whether it serves.

    is_alive: whether it does anything at all; one that has said so and then does not for long is killed.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Command],
        is_ready: Callable[[], Awaitable[bool]],
        changed: Callable[[], None],
        is_alive: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.last_exit: int | None = None
        self._launch = launch
        self._is_ready = is_ready
        self._changed = changed
        self._is_alive = is_alive
        self._command: Command | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._served = False  # when last looked at
        self._watch: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._hold = 0.0
        self._let_go = asyncio.Event()

    def hold(self, seconds: float) -> None:
        """Start it again no sooner than so long after its next exit, or when it is let go."""
        self._hold = seconds
        self._let_go.clear()

    def let_go(self) -> None:
        """End the hold, and what is left of the present wait."""
        self._hold = 0.0
        self._let_go.set()

    @property
    def pid(self) -> int | None:
        """Of the running process; None between an exit and the restart."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def ready(self) -> bool:
        """Whether it serves: a process that is gone does not, from that moment on."""
        return self._served and self.pid is not None

    @property
    def state(self) -> ProcessState | None:
        """For stack.json; None while there is no process."""
        pid = self.pid
        if pid is None or self._command is None:
            return None
        orphan = int(self._command.orphan_signal)
        return ProcessState(self.name, pid, identify(pid).started, orphan, self._served, self.restarts, self.last_exit)

    async def start(self, timeout: float) -> None:
        """Start it and return when it serves. Raises StackError when it does not, or keeps dying."""
        self._watch = asyncio.create_task(self._keep_alive(), name=self.name)
        deadline = time.monotonic() + timeout
        while not self.ready:
            if self._watch.done():
                await self._watch
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} is not ready after {timeout:.0f} s{self._blame()}")
            await asyncio.sleep(_POLL)

    async def stop(self) -> None:
        """End it; returns when it is gone."""
        self._stopping.set()  # a library below may swallow the cancellation
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError, StackError, OSError):
                await self._watch
        if self._process and self._command:
            await stop(self._process, self._command)
        self._served = False

    async def _keep_alive(self) -> None:
        backoff, was_ready = _FIRST_BACKOFF, False
        while not self._stopping.is_set():
            started = time.monotonic()
            self._command = self._launch()
            self._process = spawn(self._command)
            self._changed()
            was_ready |= await self._live(self._process, self._command.log)
            if self._stopping.is_set():
                return
            self._served, self.last_exit = False, self._process.returncode
            self.restarts += 1
            self._changed()
            if not was_ready and self.restarts >= _EXITS_BEFORE_READY:
                raise StackError(f"{self.name} ends as soon as it is started{self._blame()}")
            if time.monotonic() - started > _STEADY_SECONDS:
                backoff = _FIRST_BACKOFF
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(backoff, self._hold)):
                    await self._let_go.wait()
            self._hold = 0.0
            self._let_go.clear()
            backoff = min(2 * backoff, _LONGEST_BACKOFF)

    async def _live(self, process: subprocess.Popen[bytes], log: Path) -> bool:
        """Watch until it ends; whether it has ever been ready."""
        was_ready, look, alive_at = False, 0.0, time.monotonic()
        while process.poll() is None and not self._stopping.is_set():
            if time.monotonic() >= look:
                await asyncio.to_thread(set_large_log_aside, log)
                ready = await self._is_ready()
                if not was_ready or self._is_alive is None or await self._is_alive():
                    alive_at = time.monotonic()
                elif time.monotonic() - alive_at > _STANDSTILL_SECONDS:
                    process.kill()
                was_ready |= ready
                look = time.monotonic() + (_LOOK_AGAIN if ready else _POLL)
                if ready != self._served:
                    self._served = ready
                    self._changed()
            await asyncio.sleep(_POLL)
        return was_ready

    def _blame(self) -> str:
        if self._command is None:
            return ""
        line = last_line(self._command.log)
        return f" ({line}): see {self._command.log}" if line else f": see {self._command.log}"
