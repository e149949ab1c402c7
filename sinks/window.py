"""The watermark sink's window: which jobs the next chunk works on, and how far each partition's offset may go. Pure.

A worker reads jobs ahead, over several batches of several partitions, and works on them by chunks of keys. A chunk is
either a piece of one large job or many small jobs whole. So a giant holds up what is behind it for one chunk only, and
small jobs cost what their keys cost.

Order: each job has a place in time, `due`: when it was created, brought forward by its priority and put back by its
size. Neither can be more than a bounded time, so whatever keeps arriving, an old job's turn comes. It changes only when
the job does, so a heap holds the order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

PRIORITY_SECONDS = 600.0
"""How much earlier one step of priority makes a job due; more than any size can put it back."""

SIZE_SECONDS = 300.0
"""The most that size puts a job back."""

KEYS_PER_SECOND = 1_000
"""How size counts as time: a job of so many keys is due a second later."""

SMALL_JOBS = 500
"""The most jobs in one chunk; larger groups cost more per job (docs/performance.md)."""

_MISFITS = 50  # jobs looked at that do not fit the rest of a chunk, before it goes without more


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """One claim of one partition: what is read under another epoch belongs to another lane."""

    topic: str
    partition: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Work:
    """What the window knows of a job. offset: of its last record.

    begun: some of its keys are done; alone: it has failed in company; not_before: in the clock of created_at, seconds.
    """

    job_id: int
    security_id: str
    offset: int
    keys_left: int
    created_at: float
    priority: int = 0
    begun: bool = False
    alone: bool = False
    not_before: float = 0.0

    @property
    def due(self) -> float:
        """Its place among the others: smaller goes first."""
        return self.created_at - self.priority * PRIORITY_SECONDS + min(self.keys_left / KEYS_PER_SECOND, SIZE_SECONDS)

    @property
    def whole(self) -> bool:
        """Whether it may share a chunk with others, to be done in one go."""
        return not self.begun and not self.alone


@dataclass(frozen=True, slots=True)
class Plan:
    """The next chunk: one job and at most so many keys of it, or several jobs with all their keys."""

    lane: Lane
    jobs: Sequence[Work]
    keys: int

    @property
    def is_group(self) -> bool:
        """Whether the jobs are done whole, in one go."""
        return all(job.whole and job.keys_left <= self.keys for job in self.jobs)


@dataclass(slots=True)
class _Jobs:
    """A lane: its open jobs, by turn and by offset. The heaps hold stale entries too, found out by comparing."""

    read_to: int
    open: dict[int, Work] = field(default_factory=dict)
    turns: list[tuple[float, int]] = field(default_factory=list)
    later: list[tuple[float, int]] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)


class Window:
    """All lanes of a worker. `plan` only looks: the caller reports what became of a chunk by `update` and `finish`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lanes: dict[Lane, _Jobs] = {}

    def __len__(self) -> int:
        return sum(len(lane.open) for lane in self._lanes.values())

    @property
    def full(self) -> bool:
        """Whether nothing more should be read ahead."""
        return len(self) >= self._capacity

    def read_to(self, lane: Lane) -> int | None:
        """Where the lane's next batch must start; None for a lane not seen yet."""
        return self._lanes[lane].read_to if lane in self._lanes else None

    def take(self, lane: Lane, jobs: Iterable[Work], next_offset: int) -> None:
        """Jobs of a batch that ends before next_offset. A lane of an older epoch of the partition goes."""
        for other in [o for o in self._lanes if (o.topic, o.partition) == (lane.topic, lane.partition) and o != lane]:
            del self._lanes[other]
        held = self._lanes.setdefault(lane, _Jobs(next_offset))
        held.read_to = next_offset
        for job in jobs:
            known = held.open.get(job.job_id)
            self._put(held, replace(known, offset=job.offset) if known else job)

    def offset(self, lane: Lane) -> int:
        """The first offset that is not done."""
        held = self._lanes[lane]
        while held.offsets:
            offset, job_id = held.offsets[0]
            if job_id in held.open and held.open[job_id].offset == offset:
                return offset
            heapq.heappop(held.offsets)
        return held.read_to

    def offset_without(self, lane: Lane, job_ids: Iterable[int]) -> int:
        """The first offset that is not done once these jobs are."""
        done = set(job_ids)
        held = self._lanes[lane]
        front = self.offset(lane)
        passed: list[tuple[int, int]] = []
        while held.offsets:
            offset, job_id = held.offsets[0]
            if job_id in held.open and held.open[job_id].offset == offset and job_id not in done:
                front = offset
                break
            passed.append(heapq.heappop(held.offsets))
        else:
            front = held.read_to
        for entry in passed:
            if entry[1] in held.open and held.open[entry[1]].offset == entry[0]:
                heapq.heappush(held.offsets, entry)
        return front

    def plan(self, keys: int, now: float) -> Plan | None:
        """The chunk whose turn it is, of at most `keys` keys; None when every job waits or none is left."""
        first = [(turn, lane) for lane, held in self._lanes.items() if (turn := self._next(held, now)) is not None]
        if not first:
            return None
        _, lane = min(first)
        held = self._lanes[lane]
        job = held.open[held.turns[0][1]]
        if not job.whole or job.keys_left > keys:
            return Plan(lane, (job,), keys)
        jobs = self._group(held, keys, now)
        return Plan(lane, jobs, sum(job.keys_left for job in jobs))

    def update(self, lane: Lane, job: Work) -> None:
        """The job after a chunk, or with another priority."""
        held = self._lanes.get(lane)
        if held and job.job_id in held.open:
            self._put(held, job)

    def finish(self, lane: Lane, job_id: int) -> None:
        """The job has ended."""
        if lane in self._lanes:
            self._lanes[lane].open.pop(job_id, None)

    def drop(self, lane: Lane) -> None:
        """The partition is someone else's, or claimed anew."""
        self._lanes.pop(lane, None)

    def prioritise(self, priorities: Mapping[int, int]) -> None:
        """Priority by job_id; every other job has 0."""
        for held in self._lanes.values():
            for job in list(held.open.values()):
                if job.priority != (wanted := priorities.get(job.job_id, 0)):
                    self._put(held, replace(job, priority=wanted))

    def _put(self, held: _Jobs, job: Work) -> None:
        before = held.open.get(job.job_id)
        held.open[job.job_id] = job
        if before is None or before.offset != job.offset:
            heapq.heappush(held.offsets, (job.offset, job.job_id))
        if before is None or (before.due, before.not_before) != (job.due, job.not_before):
            if job.not_before:
                heapq.heappush(held.later, (job.not_before, job.job_id))
            else:
                heapq.heappush(held.turns, (job.due, job.job_id))

    def _next(self, held: _Jobs, now: float) -> float | None:
        """When the lane's first job was due; stale entries go on the way."""
        while held.later and held.later[0][0] <= now:
            moment, job_id = heapq.heappop(held.later)
            job = held.open.get(job_id)
            if job and job.not_before == moment:
                self._put(held, replace(job, not_before=0.0))
        while held.turns:
            turn, job_id = held.turns[0]
            job = held.open.get(job_id)
            if job and job.due == turn and not job.not_before:
                return turn
            heapq.heappop(held.turns)
        return None

    def _group(self, held: _Jobs, keys: int, now: float) -> list[Work]:
        """Small jobs in order of their turns, as many as fit, no two of one security."""
        looked: list[tuple[float, int]] = []
        jobs: list[Work] = []
        securities: set[str] = set()
        misfits = 0
        while len(jobs) < SMALL_JOBS and misfits < _MISFITS and self._next(held, now) is not None:
            entry = heapq.heappop(held.turns)
            if entry in looked[-1:]:  # the same job twice
                continue
            looked.append(entry)
            job = held.open[entry[1]]
            if job.whole and job.keys_left <= keys and job.security_id not in securities:
                jobs.append(job)
                securities.add(job.security_id)
                keys -= job.keys_left
            else:
                misfits += 1
        for entry in looked:
            heapq.heappush(held.turns, entry)
        return jobs
