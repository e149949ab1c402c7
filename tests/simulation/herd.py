"""The watermark sink on the models: the engine's own window and offset ledger, one chunk after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sinks.batches import Batch
from sinks.model import Job
from sinks.offsets import Fenced, Offsets
from sinks.window import Lane, Plan, Window, Work
from tests.simulation.books import TERMINAL, JobRow
from tests.simulation.kafka import Record
from tests.simulation.ledger import ledger
from tests.simulation.scheduler import pause

if TYPE_CHECKING:
    from tests.simulation.world import Member, World

_TOPIC = "reprocessing-jobs"
_ALL = 1_000  # more keys than there are


class _Moved(Exception):  # noqa: N818 - an outcome
    """A job is not where it was read: another worker, or another chunk, has moved it."""


class Herd:
    """One worker under one claim; jobs are read ahead, and chunks are as small as they can be."""

    def __init__(self, world: World, offsets: Offsets, lane: Lane) -> None:
        self._world = world
        self._offsets = offsets
        self._lane = lane
        self._window = Window(100)
        self._jobs: dict[int, JobRow] = {}

    @property
    def idle(self) -> bool:
        """Whether no job is left in the window."""
        return not len(self._window)

    async def open(self, batch: Batch) -> None:
        """The jobs of the batch go into the window; what is finished in front of it is passed."""
        jobs: dict[int, Job] = {}
        at: dict[int, int] = {}
        records: Sequence[Any] = self._offsets.fresh(batch, self._window.read_to(self._lane))
        for record in records:
            if record.value is not None:
                jobs[record.value.job_id], at[record.value.job_id] = record.value, record.offset
        opened = await self._step(lambda c: self._world.books.open_jobs(c.tx, list(jobs.values()))) if jobs else []
        self._jobs.update(opened)
        left = [
            Work(job_id, job.security, at[job_id], self._world.choices.draw(3), self._world.scheduler.steps)
            for job_id, job in opened
            if job.status not in TERMINAL
        ]
        self._window.take(self._lane, left, batch.next_offset)
        await self._pass()

    async def chunk(self) -> None:
        """One chunk of the job, or of the jobs, whose turn it is."""
        plan = self._window.plan(1 + self._world.choices.draw(2), self._world.scheduler.steps)
        assert plan is not None
        try:
            done = await self._work(plan)
        except _Moved:
            done = {work.job_id: self._world.database.tables["jobs"][work.job_id] for work in plan.jobs}
        for work in plan.jobs:
            job = self._jobs[work.job_id] = done[work.job_id]
            if job.status in TERMINAL:
                self._window.finish(self._lane, work.job_id)
            else:
                self._window.update(self._lane, replace(work, begun=True))
        await self._pass()

    async def _work(self, plan: Plan) -> dict[int, JobRow]:
        scan = _ALL if plan.is_group else max(1, plan.keys)

        async def reset(connection: Any) -> dict[int, JobRow]:
            done: dict[int, JobRow] = {}
            for work in sorted(plan.jobs, key=lambda each: each.job_id):
                job = self._jobs[work.job_id]
                after = await self._world.books.reset_chunk(connection.tx, work.job_id, job, scan)
                if after is None:
                    raise _Moved
                done[work.job_id] = after
            return done

        def reached(done: dict[int, JobRow]) -> int:
            ended = [job_id for job_id, job in done.items() if job.status in TERMINAL]
            return self._window.offset_without(self._lane, ended)

        return await self._step(reset, reached)

    async def _pass(self) -> None:
        """The offset alone."""
        await self._offsets.step(self._lane, self._window.offset(self._lane), _nothing)

    async def _step(self, effect: Any, reached: Any = None) -> Any:
        stored = self._offsets.claimed(self._lane).next_offset
        return await self._offsets.step(self._lane, stored, effect, reached)


async def resets(world: World, member: Member) -> None:
    """The worker, until the partition is another's."""
    generation, log = member.generation, world.broker.logs[_TOPIC, 0]
    offsets = ledger(world.database, "resets", fenced=world.guards.fence)
    claim = (await offsets.claim({(_TOPIC, 0): 0}))[_TOPIC, 0]
    offsets.check((_TOPIC, 0), claim.next_offset, 0, log.end)
    herd = Herd(world, offsets, Lane(_TOPIC, 0, claim.epoch))
    position = claim.next_offset
    try:
        while True:
            if not herd.idle and (log.end <= position or not world.read_ahead or world.choices.draw(2)):
                await pause()
                await herd.chunk()
                continue
            if not await world.more(member, generation, lambda at=position: log.end > at):  # type: ignore[misc]
                return
            records: Sequence[Record] = log.read(position, 1 + world.choices.draw(2))
            if records:
                batch = Batch(_TOPIC, 0, claim.epoch, position, records)
                await herd.open(batch)
                position = batch.next_offset
            else:  # compacted away up to the end
                position = log.end
    except Fenced:
        world.rejoin(member, generation)


async def _nothing(connection: Any) -> None:
    """No effect."""
