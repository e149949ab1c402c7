"""The worker's side of trials: which partitions are read by a process of their own, and what its end means.

A partition whose last two claims ended without progress is left out of the worker's fetches from the start of its
claim, so nothing of it is in hand here. The trial (`streams.trial`) works under the same claim. When it is over, the
worker reads on from where the trial has come to. A rebalance ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faust.types import TP

from sinks import suspects
from sinks.batches import Batch
from sinks.database import is_transient
from sinks.offsets import Claim, Stopping
from streams import metrics
from streams.trial import FENCED, Subject

if TYPE_CHECKING:
    from streams.app import App

logger = logging.getLogger(__name__)

PROGRAM = [sys.executable, "-m", "streams.trial"]
_BARREN = 2  # claims in a row
_FUTILE = 3  # trials in a row that do not get as far as to name a record
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_GRACE_SECONDS = 30.0  # beyond the deadline that the trial itself keeps
_UNSAID_SECONDS = 2.0
_LINE_BYTES = 1 << 20


def ending(status: int, seconds: float) -> str:
    """In words, how a process ended."""
    if status == -signal.SIGALRM:
        return f"the process took longer than {seconds:g} s"
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


class Trials:
    """The trials of one worker. subjects: what the records of each topic are for."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.subjects: dict[str, Subject] = {}
        self._running: dict[TP, asyncio.Task[None]] = {}
        self._processes: dict[TP, asyncio.subprocess.Process] = {}
        app.before_wait_empty.append(self.stop)

    def begin(self, claims: Mapping[TP, Claim]) -> set[TP]:
        """Start the trials that are due; returns their partitions."""
        due = {tp for tp, claim in claims.items() if claim.barren >= _BARREN and tp.topic in self.subjects}
        for tp in due:
            logger.error("%s[%d]: %d claims in a row ended without progress; it is read in trial, from %d on",
                         tp.topic, tp.partition, claims[tp].barren, claims[tp].next_offset)  # fmt: skip
            self._running[tp] = asyncio.create_task(self._guarded(tp, claims[tp]))
        return due

    def end(self) -> None:
        """End all trials at once. May be called from another thread."""
        for process in list(self._processes.values()):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End all trials and wait for that."""
        running = [task for task in self._running.values() if not task.done()]
        self._running.clear()
        for task in running:
            task.cancel()
        self.end()
        if running:
            await asyncio.wait(running)

    async def _interrupted(self, tp: TP) -> None:
        """Postgres that is away is not waited for: then the record is tried once less, at worst."""
        group = self._app.settings.group(self._app.role)
        try:
            async with asyncio.timeout(_UNSAID_SECONDS), (await self._app.pool()).acquire() as connection:
                await suspects.interrupt(connection, group, (tp.topic, tp.partition))
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s[%d]: the end of the trial stays unsaid: %s", tp.topic, tp.partition, error)

    async def _guarded(self, tp: TP, claim: Claim) -> None:
        gauge = metrics.IN_TRIAL.labels(self._name(tp))
        gauge.inc()
        try:
            await self._hold(tp, claim)
            if not self._is_ours(tp, claim):
                await self._interrupted(tp)
        except asyncio.CancelledError:
            await self._interrupted(tp)
        except Stopping:
            pass
        except Exception as error:
            logger.exception("%s[%d] in trial", tp.topic, tp.partition)
            self._app.fail(f"{type(error).__name__}: {error}")
        finally:
            gauge.dec()

    def _is_ours(self, tp: TP, claim: Claim) -> bool:
        held = self._app.offsets.held((tp.topic, tp.partition))
        return held is not None and held.epoch == claim.epoch and not self._app.should_stop

    async def _hold(self, tp: TP, claim: Claim) -> None:
        """Trial after trial, until one comes to its end or the partition goes elsewhere."""
        at: int | None = claim.next_offset
        failure = "the worker died with it"
        pause, futile = _FIRST_PAUSE, 0
        while self._is_ours(tp, claim):
            if at is not None:
                await self._note(tp, at, failure)
            last = await self._try(tp, claim.epoch)
            if not self._is_ours(tp, claim):
                return
            if (end := last.get("end")) is not None:
                await self._go_on(tp, Claim(end, claim.epoch))
                return
            if last["status"] == FENCED:
                self._app.fenced(Batch(tp.topic, tp.partition, claim.epoch, 0, []))
                return
            if "limit" in last:
                self._app.fail(f"{tp.topic}: {last['limit']} records were condemned within an hour; another is not")
            failure = ending(last["status"], self._app.settings.trial_seconds)
            before, at = at, last.get("at")
            futile = 0 if at is not None else futile + 1
            if futile:
                logger.error("%s[%d]: a trial came to nothing: %s", tp.topic, tp.partition, failure)
            if futile >= _FUTILE:
                await self._go_on(tp, await self._app.offsets.recall((tp.topic, tp.partition), claim.epoch))
                return
            pause = _FIRST_PAUSE if at != before else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _note(self, tp: TP, offset: int, failure: str) -> None:
        group = self._app.settings.group(self._app.role)
        place = (tp.topic, tp.partition)
        deaths = await self._app.offsets.patiently(lambda c: suspects.fail(c, group, place, offset, failure))
        if deaths is not None:
            logger.error("%s[%d] at %d, in trial: %s (%d failures count)", *place, offset, failure, deaths)

    async def _go_on(self, tp: TP, claim: Claim) -> None:
        logger.warning("%s[%d]: the trial is over at %d", tp.topic, tp.partition, claim.next_offset)
        self._app.offsets.take_on((tp.topic, tp.partition), claim)
        await self._app.consumer.go_on(tp, claim)

    async def _try(self, tp: TP, epoch: int) -> dict[str, Any]:
        """One trial; returns what it said last under each name, and its exit status."""
        settings = self._app.settings
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, self._app.role, tp.topic, str(tp.partition), str(epoch),
            env={**os.environ, **settings.environment()}, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES,
        )  # fmt: skip
        self._processes[tp] = process
        said: dict[str, Any] = {}
        counted: dict[str, dict[str, float]] = {}
        try:
            await self._listen(tp, process, said, counted)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            said["status"] = await process.wait()
            self._processes.pop(tp, None)
        return said

    async def _listen(
        self, tp: TP, process: asyncio.subprocess.Process, said: dict[str, Any], counted: dict[str, dict[str, float]]
    ) -> None:
        assert process.stdout is not None
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(self._app.settings.trial_seconds + _GRACE_SECONDS):
                    line = await process.stdout.readline()
                if not line:
                    await process.wait()
                    return
                message = json.loads(line)
                metrics.add_counted(counted, message["counted"])
                counted = message.pop("counted")
                if "condemned" in message:
                    metrics.DEAD_LETTERS.labels(self._name(tp), "poison").inc()
                    logger.critical("%s[%d]: the record at offset %d is passed over as poison: %s",
                                    tp.topic, tp.partition, message["condemned"], message["detail"])  # fmt: skip
                if "at" in message or "condemned" in message:
                    self._app.outbox_written()
                said.update(message)

    def _name(self, tp: TP) -> str:
        name: str = tp.topic.removeprefix(self._app.settings.topic_prefix)
        return name
