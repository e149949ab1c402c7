"""Role `resets`: the rate-limited watermark sink, in an app of its own (design, Watermark sink).

A batch of the job topic is the window: its jobs are worked on in turn, chunk by chunk, so that a giant does not block
the small; the offset follows over the finished prefix.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import TypeVar

import msgspec

from sinks import limiter, resets
from sinks.database import Connection, is_transient
from sinks.limiter import Reservation
from sinks.model import Job
from sinks.offsets import Batch, Fenced, Record, Stopping
from sinks.resets import JobMoved, OpenJob
from streams import health, metrics, topics
from streams.app import App
from streams.settings import load

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.5
_job = msgspec.json.Decoder(Job)

app = App("resets", load())
health.add_pages(app)


@app.agent(app.input(topics.JOBS))
async def reset_watermarks(batches: AsyncIterable[Batch]) -> None:
    """reprocessing-jobs → watermarks, statuses."""
    async for batch in batches:
        try:
            await Window(batch).work()
        except Fenced:
            metrics.FENCED.labels(topics.JOBS).inc()
            logger.warning("%s[%d]: fenced; its jobs go on elsewhere", batch.topic, batch.partition)
            app.fenced(batch)
        except Stopping:
            return
        except Exception as error:
            logger.exception("%s[%d] from offset %d", batch.topic, batch.partition, batch.start)
            app.fail(f"{type(error).__name__}: {error}")


class Window:
    """The jobs of one batch, and how far they are."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._unfinished: dict[int, int] = {}  # job_id: offset of its last record

    async def work(self) -> None:
        """Until every job has ended."""
        jobs = self._read(app.offsets.fresh(self._batch))
        turns: deque[OpenJob] = deque()
        if jobs:
            turns.extend(await self._step(lambda c: resets.open_jobs(c, jobs)))
            app.outbox_written()
        while turns:
            job = turns.popleft()
            if job.ended:
                del self._unfinished[job.job_id]
            else:
                turns.append(await self._advance(job))
        await self._step(_nothing)

    def _read(self, records: list[Record]) -> list[Job]:
        jobs: dict[int, Job] = {}
        for record in records:
            if record.value is None:
                continue
            try:
                job = _job.decode(record.value)
            except msgspec.DecodeError as error:  # the trigger agent is the only writer; the ledger issues it again
                logger.error("job record at offset %d is unreadable, ignored: %s", record.offset, error)
                continue
            jobs[job.job_id] = job
            self._unfinished[job.job_id] = record.offset
        return list(jobs.values())

    async def _step(self, effect: Callable[[Connection], Awaitable[T]]) -> T:
        """A fenced transaction; the offset moves up to the first job that is not done."""
        done = min(self._unfinished.values(), default=self._batch.next_offset)
        return await app.offsets.step(self._batch, done, effect)

    async def _advance(self, job: OpenJob) -> OpenJob:
        """One chunk under the rate limit. Fails the job after some attempts that no retry could help."""
        reserved = await _reserve(min(app.settings.reset_chunk_rows, max(1, job.keys_left)))
        scan = reserved.rows if job.keys_left > reserved.rows else app.settings.reset_chunk_rows
        try:
            chunk = await self._step(lambda c: resets.reset_chunk(c, job, scan))
            metrics.KEYS_RESET.inc(chunk.keys_reset)
            job = chunk.job
        except (Fenced, Stopping):
            raise
        except JobMoved:
            job = await self._step(lambda c: resets.reread(c, job))
        except Exception as error:
            job = await self._failed(job, error)
        app.outbox_written()
        return job

    async def _failed(self, job: OpenJob, error: Exception) -> OpenJob:
        reason = f"{type(error).__name__}: {error}"
        attempts = await self._step(lambda c: resets.note_attempt(c, job))
        logger.error("job %d, attempt %d: %s", job.job_id, attempts, reason)
        if attempts < _ATTEMPTS:
            await asyncio.sleep(_PAUSE_SECONDS * attempts)
            return job
        return await self._step(lambda c: resets.fail(c, job, reason))


async def _nothing(connection: Connection) -> None:
    """The offset alone."""


async def _reserve(rows: int) -> Reservation:
    """Wait for the limit. Raises Stopping."""
    while True:
        if app.should_stop:
            raise Stopping
        try:
            async with (await app.pool()).acquire() as connection:
                await limiter.set_first_value(connection, app.settings.reset_rows_per_second)
                reserved = await limiter.reserve(connection, rows)
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("rate limit: %s: %s; trying again", type(error).__name__, error)
            reserved = None
        if reserved:
            await asyncio.sleep(reserved.wait_seconds)
            return reserved
        await asyncio.sleep(_PAUSE_SECONDS)
