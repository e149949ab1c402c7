"""Working the window of reset jobs: chunk after chunk, under the cluster-wide rate (design, Watermark sink).

The agent hands batches over and Faust may acknowledge them at once: what counts is the offset in Postgres, which moves
over the finished prefix of each partition in the transaction of the chunk that finishes it. One task does everything
else, so a partition never has two transactions at a time, and a rebalance never waits for a giant.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from sinks import limiter, resets
from sinks.batches import Batch, Place, Record
from sinks.chunks import ChunkSize
from sinks.database import Connection, Pool, is_transient
from sinks.limiter import Reservation
from sinks.model import Job
from sinks.offsets import Fenced, Offsets, Overburdened, Released, Stopping
from sinks.resets import JobMoved, OpenJob, SmallChunk
from sinks.window import Lane, Plan, Window, Work
from streams import internal, logs, metrics, topics
from streams.internal import Skipped
from streams.settings import Settings
from streams.tracing import Traces

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.5  # after a failed attempt; doubled each time
_WINDOW_JOBS = 100_000
_FIRST_CHUNK = 2_000  # keys, until there is something to learn from
_SMALLEST_CHUNK = 50  # keys: below it the fixed cost of a chunk is most of it
_LOOK_SECONDS = 0.25  # how soon new batches and rates are noticed while there is nothing else to do
_STEER_SECONDS = 0.5  # how soon a priority is


class Host(Protocol):
    """The worker around a herd."""

    settings: Settings
    offsets: Offsets
    traces: Traces
    should_stop: bool
    rebalancing: bool

    async def pool(self) -> Pool:
        """Connections to Postgres."""

    def outbox_written(self) -> None:
        """Events wait for the relay."""

    def fenced(self, place: Place) -> None:
        """Another worker has claimed the partition."""


class Herd:
    """The window of one worker and the task that works it."""

    def __init__(self, app: Host, beat: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._beat = beat
        self._window = Window(_WINDOW_JOBS)
        self._arrivals: deque[Batch] = deque()
        self._news = asyncio.Event()
        self._jobs: dict[Lane, dict[int, OpenJob]] = {}
        self._most = app.settings.reset_chunk_rows
        self._steered = 0.0
        self._skipped = Skipped(app.settings.topic(topics.JOBS))
        largest = app.settings.reset_chunk_rows
        target = app.settings.reset_chunk_target_ms / 1000
        self._size = ChunkSize(min(_FIRST_CHUNK, largest), largest, target, _SMALLEST_CHUNK)

    @property
    def idle(self) -> bool:
        """Whether no job is left to work on."""
        return not self._arrivals and not len(self._window)

    async def take(self, batch: Batch) -> None:
        """Read the batch ahead; waits while the window is full. A batch that a rebalance makes stale is dropped.

        What has arrived and is not in the window yet counts: a chunk may take long, and batches come quickly.
        """
        while len(self._window) + sum(map(len, self._arrivals)) >= _WINDOW_JOBS and not self._app.should_stop:
            if self._app.rebalancing:
                return  # every partition is about to be claimed anew, and read again from the stored offset
            await asyncio.sleep(_LOOK_SECONDS)
        self._arrivals.append(batch)
        self._news.set()

    async def run(self) -> None:
        """Until the worker stops. An error that leaves is a bug."""
        await self._patiently(lambda c: limiter.set_first_value(c, self._app.settings.reset_rows_per_second))
        while not self._app.should_stop:
            self._beat()
            try:
                await self._turn()
            except Stopping:
                return

    async def work_off(self, batch: Batch, alive: Callable[[], None]) -> None:
        """Work one batch to its end. alive: called at each turn."""
        await self.take(batch)
        while not self.idle:
            await self._turn()
            alive()

    async def _turn(self) -> None:
        """Open what has arrived, then one chunk if the rate allows."""
        self._news.clear()
        while self._arrivals and not self._window.full:
            try:
                await self._open(self._arrivals[0])
            except Overburdened as error:
                first, rest = self._arrivals[0].split(len(self._arrivals[0]) // 2)
                if rest is None:
                    raise
                logger.warning("%s[%d]: %s; half as many jobs at once", first.topic, first.partition, error)
                self._arrivals[0] = rest
                self._arrivals.appendleft(first)
            else:
                self._arrivals.popleft()
        await self._steer()
        plan = self._window.plan(min(self._size.count, self._most), time.time())
        if plan is None:
            await _soon(self._news)
            return
        granted = await self._patiently(lambda c: limiter.reserve(c, max(1, min(plan.keys, self._left(plan)))))
        self._most = granted.most
        if granted.rows == 0:
            await _soon(self._news, granted.wait_seconds)
            return
        used = await self._work(plan, granted)
        if used != granted.rows:
            unused = granted.rows - used
            await self._patiently(lambda c: limiter.give_back(c, unused))

    async def _open(self, batch: Batch) -> None:
        lane = Lane(batch.topic, batch.partition, batch.epoch)
        try:
            records = self._app.offsets.fresh(batch, self._window.read_to(lane))
            jobs, offsets = decode(records, self._skipped)
            opened, refused = await self._step(lane, lambda c: _admit(c, jobs), len(jobs)) if jobs else ([], [])
        except Fenced as outcome:
            self._fenced(lane, outcome)
            return
        for each in refused:
            self._skipped.count("number", f"{each.job_id} is no correction of {each.security_id} from then on")
        self._jobs.setdefault(lane, {}).update({job.job_id: job for job in opened if not job.ended})
        left = [_work(job, offsets[job.job_id]) for job in opened if not job.ended]
        self._window.take(lane, left, batch.next_offset)
        await self._pass(lane)
        self._app.outbox_written()

    async def _pass(self, lane: Lane) -> None:
        """Tombstones and finished jobs at the front of the lane: the offset alone."""
        try:
            await self._app.offsets.step(lane, self._window.offset(lane), _nothing)
        except Fenced as outcome:
            self._fenced(lane, outcome)

    async def _steer(self) -> None:
        """Priorities that operators have set since."""
        if len(self._window) and time.monotonic() - self._steered > _STEER_SECONDS:
            self._steered = time.monotonic()
            self._window.prioritise(await self._patiently(resets.priorities))

    def _left(self, plan: Plan) -> int:
        return sum(job.keys_left for job in plan.jobs)

    async def _work(self, plan: Plan, granted: Reservation) -> int:
        """One chunk; returns the keys reset."""
        started = time.perf_counter()
        try:
            if plan.is_group and granted.rows >= plan.keys:
                used = await self._work_group(plan)
            else:
                with logs.about(job_id=plan.jobs[0].job_id, security_id=plan.jobs[0].security_id):
                    used = await self._work_piece(plan.lane, plan.jobs[0], granted.rows)
        except Fenced as outcome:
            self._fenced(plan.lane, outcome)
            return 0
        seconds = time.perf_counter() - started
        self._size = self._size.after(used, seconds)
        metrics.KEYS_RESET.inc(used)
        metrics.CHUNK_SECONDS.observe(seconds)
        self._app.outbox_written()
        return used

    async def _work_group(self, plan: Plan) -> int:
        began = time.time()
        jobs = [self._jobs[plan.lane][job.job_id] for job in plan.jobs]

        async def reset(connection: Connection) -> SmallChunk:
            chunk = await resets.reset_small(connection, jobs)
            if not all(job.ended for job in chunk.jobs):
                raise JobMoved
            return chunk

        ids = [job.job_id for job in plan.jobs]
        try:
            chunk = await self._app.offsets.step(
                plan.lane, self._stored(plan.lane), reset, lambda _: self._window.offset_without(plan.lane, ids)
            )
        except (Fenced, Stopping):
            raise
        except Exception as error:
            logger.warning("a chunk of %d jobs: %s: %s; each alone now", len(jobs), type(error).__name__, error)
            for job in plan.jobs:
                self._window.update(plan.lane, replace(job, alone=True))
            return 0
        for done in chunk.jobs:
            self._tell(done, done.keys_done, began)
            self._forget(plan.lane, done.job_id)
        return chunk.keys_reset

    async def _work_piece(self, lane: Lane, work: Work, rows: int) -> int:
        job = self._jobs[lane][work.job_id]
        began = time.time()
        scan = rows if work.keys_left > rows else max(rows, self._size.count) + 1  # one more key shows: it is the last
        keys = 0
        try:
            chunk = await self._app.offsets.step(
                lane,
                self._stored(lane),
                lambda c: resets.reset_chunk(c, job, scan),
                lambda c: self._window.offset_without(lane, [job.job_id] if c.job.ended else []),
            )
            after, keys = chunk.job, chunk.keys_reset
        except (Fenced, Stopping):
            raise
        except JobMoved:
            (after,) = await self._step(lane, lambda c: resets.answer(c, [job.job_id]))
        except Exception as error:
            await self._failed(lane, work, error)
            return 0
        self._jobs[lane][job.job_id] = after
        self._tell(after, keys, began)
        if after.ended:
            self._forget(lane, job.job_id)
            await self._pass(lane)
        else:
            self._window.update(lane, replace(work, keys_left=after.keys_left, begun=after.cursor != ""))
        return keys

    async def _failed(self, lane: Lane, work: Work, error: Exception) -> None:
        """Tried again later; after some attempts, which no retry could help, the job has FAILED."""
        job = self._jobs[lane][work.job_id]
        reason = f"{type(error).__name__}: {error}"
        attempts, wait = await self._step(lane, lambda c: resets.note_attempt(c, job, reason, _PAUSE_SECONDS))
        logger.error("job %d, attempt %d: %s", job.job_id, attempts, reason)
        if attempts < _ATTEMPTS:
            self._window.update(lane, replace(work, not_before=time.time() + wait))
            return
        await self._step(lane, lambda c: resets.fail(c, job, reason))
        self._forget(lane, job.job_id)
        await self._pass(lane)

    def _tell(self, job: OpenJob, keys: int, began: float) -> None:
        """What a chunk has done for the job."""
        about = {"job_id": job.job_id, "security_id": job.security_id}
        self._app.traces.done("reset", job.job_id, began, keys=keys, **about)
        if job.ended:
            with logs.about(**about):
                logger.info("job %d %s: %d keys reset", job.job_id, job.status, job.keys_done)

    def _forget(self, lane: Lane, job_id: int) -> None:
        self._window.finish(lane, job_id)
        self._jobs[lane].pop(job_id, None)

    def _fenced(self, lane: Lane, outcome: Fenced) -> None:
        if isinstance(outcome, Released):
            logger.info("%s[%d]: given up for a rebalance; its jobs go on at their cursors", lane.topic, lane.partition)
        else:
            metrics.FENCED.labels(lane.topic).inc()
            logger.warning("%s[%d]: fenced; its jobs go on elsewhere", lane.topic, lane.partition)
            self._app.fenced(lane)
        self._window.drop(lane)
        self._jobs.pop(lane, None)

    def _stored(self, lane: Lane) -> int:
        """The offset that Postgres holds for the lane. Raises Fenced when the claim is not ours any more."""
        return self._app.offsets.claimed(lane).next_offset

    async def _step(self, lane: Lane, effect: Callable[[Connection], Awaitable[T]], jobs: int = 0) -> T:
        """A fenced transaction that leaves the offset where it is. jobs: of which fewer may be tried."""
        return await self._app.offsets.step(lane, self._stored(lane), effect, records=jobs)

    async def _patiently(self, query: Callable[[Connection], Awaitable[T]]) -> T:
        """Outside of any fence; a transient error is waited out. Raises Stopping."""
        while not self._app.should_stop:
            try:
                async with (await self._app.pool()).acquire() as connection:
                    return await query(connection)
            except Exception as error:
                if not is_transient(error):
                    raise
                logger.warning("%s: %s; trying again", type(error).__name__, error)
            await asyncio.sleep(_PAUSE_SECONDS)
        raise Stopping


def decode(records: Sequence[Record], skipped: Skipped) -> tuple[list[Job], dict[int, int]]:
    """The jobs, without tombstones, and the offset of each one's last record."""
    jobs: dict[int, Job] = {}
    offsets: dict[int, int] = {}
    for record in records:
        if record.value is None:
            continue
        job = skipped.read(internal.decode_job, record)
        if job:
            jobs[job.job_id] = job
            offsets[job.job_id] = record.offset
    return list(jobs.values()), offsets


async def _admit(connection: Connection, jobs: Sequence[Job]) -> tuple[list[OpenJob], list[Job]]:
    """The jobs that stand for corrections, opened; and the others, which are answered as cancelled."""
    issued = await resets.issued(connection, jobs)
    refused = [job for job in jobs if job.job_id not in issued]
    if refused:
        await resets.refuse(connection, refused)
        jobs = [job for job in jobs if job.job_id in issued]
    return await resets.open_jobs(connection, jobs) if jobs else [], refused


def _work(job: OpenJob, offset: int) -> Work:
    return Work(
        job.job_id,
        job.security_id,
        offset,
        job.keys_left,
        job.created_at.timestamp(),
        job.priority,
        begun=job.cursor != "",
    )


async def _nothing(connection: Connection) -> None:
    """The offset alone."""


async def _soon(event: asyncio.Event, seconds: float = _LOOK_SECONDS) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
