"""Exactly once from Kafka into Postgres: the effect of a batch and the offset after it commit in one transaction.

Postgres owns the offsets of every topic whose effect is in Postgres (`kafka_offsets`). A worker that is assigned a
partition *claims* it: epoch + 1. From then on each transaction compares-and-swaps (next_offset, epoch), so a worker
that lost the partition without knowing (a zombie) is fenced out by the very transaction that would do harm.

Three outcomes for a batch: applied, Fenced (drop it and wait for the rebalance), or an error that must stop the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import asyncpg

from sinks import claiming
from sinks.batches import Batch, Place, Record
from sinks.database import Connection, Pool, is_transient
from sinks.failures import Failure, failure_of, is_too_much

logger = logging.getLogger(__name__)

Partition = tuple[str, int]
T = TypeVar("T")

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.05, 1.0
_PATIENCE = 5  # failures in a row of one record alone, of kinds that its own effect may cause
_RELEASE_SECONDS = 2.0

_SWAP = """
update kafka_offsets set next_offset = $4
where consumer_group = $1 and topic = $2 and partition = $3 and next_offset = $5 and epoch = $6
returning 1
"""

# A plain read would not see a commit that is still in doubt; the lock waits for it.
_READ_BACK = """
select next_offset, epoch from kafka_offsets
where consumer_group = $1 and topic = $2 and partition = $3
for update
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """What this worker believes Postgres holds for a partition.

    barren: how many claims before it, in a row, ended without progress although records waited.
    """

    next_offset: int
    epoch: int
    barren: int = field(default=0, compare=False)


class Fenced(Exception):  # noqa: N818 - an outcome, not an error
    """Another worker has claimed the partition since; nothing was changed."""


class Released(Fenced):
    """This worker has itself given the claim up, for a rebalance that waits for it; nothing was changed."""


class Stopping(Exception):  # noqa: N818
    """The worker is shutting down while a transient error persists; nothing was changed."""


class BrokenChain(Exception):  # noqa: N818
    """A batch does not start where the last one ended: records between them would be lost. Stop the worker."""


class Overburdened(Exception, Generic[T]):  # noqa: N818
    """The effect of these records keeps failing; fewer of them may pass. __cause__ is the last error.

    done: the outcomes of what was committed before.
    """

    def __init__(self, reason: str, done: Sequence[T] = ()) -> None:
        super().__init__(reason)
        self.done = list(done)


class OffsetOutsideLog(Exception):  # noqa: N818
    """The stored offset is not in the topic's log. Consuming from anywhere else would lose or skip records."""


class Offsets:
    """The claims and transactions of one consumer group. Not for concurrent use of the same partition."""

    def __init__(self, pool: Callable[[], Awaitable[Pool]], group: str, stopping: Callable[[], bool]) -> None:
        self._pool = pool
        self._group = group
        self._stopping = stopping
        self._held: dict[Partition, Claim] = {}
        self._given_up: dict[Partition, Claim] = {}
        self.patience = _PATIENCE

    def held(self, partition: Partition) -> Claim | None:
        """The newest claim of this worker on the partition."""
        return self._held.get(partition)

    async def claim(
        self, log_starts: Mapping[Partition, int], log_ends: Mapping[Partition, int] | None = None
    ) -> dict[Partition, Claim]:
        """Take the partitions over: every older claim is fenced from here on. Waits for Postgres as long as it takes.

        A first claim starts at the log's beginning. Whether the log still holds the offset is to be checked then
        (`check`), against a log looked at after the claim: until it, the owner before may have moved on.
        """
        await self.hand_over()  # what this very process held, it has not died of
        ends = log_ends or {}
        places = [(*place, start, ends.get(place, start)) for place, start in log_starts.items()]
        columns = [list(column) for column in zip(*places, strict=True)]
        rows = await self.patiently(lambda c: c.fetch(claiming.CLAIM, self._group, *columns))
        claims = {
            (row["topic"], row["partition"]): Claim(row["next_offset"], row["epoch"], row["barren"]) for row in rows
        }
        for partition, claim in claims.items():
            current = self._held.get(partition)
            if current is None or current.epoch < claim.epoch:
                self._held[partition] = claim
        return claims

    def release(self) -> None:
        """Give up every claim, at the start of a rebalance: batches in hand end at their next step or retry.

        May be called from another thread. The claims that follow the rebalance are new ones.
        """
        self._given_up.update(self._held)
        self._held.clear()

    async def hand_over(self) -> None:
        """Tell the next owners that the claims were given up in order. Postgres that is away is not waited for."""
        claims = {**self._given_up, **self._held}
        self._given_up.clear()
        places = [(*place, claim.epoch) for place, claim in claims.items()]
        if not places:
            return
        try:
            async with asyncio.timeout(_RELEASE_SECONDS), (await self._pool()).acquire() as connection:
                await connection.execute(claiming.RELEASE, self._group, *map(list, zip(*places, strict=True)))
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("Postgres: %s: %s; the claims end unsaid", type(error).__name__, error)

    async def recall(self, partition: Partition, epoch: int) -> Claim:
        """What is stored under a claim. Raises Fenced when there is a newer one."""
        row = await self.patiently(lambda c: c.fetchrow(_READ_BACK, self._group, *partition))
        if row is None or row["epoch"] != epoch:
            raise Fenced
        return Claim(row["next_offset"], epoch)

    def take_on(self, partition: Partition, claim: Claim) -> None:
        """Act under a claim that another process of this worker made, or moved on meanwhile."""
        self._held[partition] = claim

    def claimed(self, batch: Place) -> Claim:
        """The claim that the batch was fetched under. Raises Fenced when it is not the newest, Released without any."""
        held = self._held.get((batch.topic, batch.partition))
        if held is None:
            raise Released
        if held.epoch != batch.epoch:
            raise Fenced
        return held

    def check(self, partition: Partition, offset: int, log_start: int, log_end: int) -> None:
        """Raise OffsetOutsideLog, saying what to do, unless the log can go on at the offset.

        Otherwise it was removed by retention or lies beyond the end (the topic was recreated, or Postgres restored from
        a later backup).
        """
        if not log_start <= offset <= log_end:
            raise OffsetOutsideLog(
                f"{partition[0]}[{partition[1]}]: the stored offset {offset} is outside the log "
                f"[{log_start}, {log_end}]: records were removed or the topic was recreated. Restore the topic, or "
                f"set next_offset in tidemark.kafka_offsets (consumer_group '{self._group}') to where it must go on"
            )

    def fresh(self, batch: Batch, read_to: int | None = None) -> list[Record]:
        """The records that are not done yet. Raises Fenced and BrokenChain: the batch must follow on what is stored.

        read_to: for a sink that reads ahead of what is stored, the offset after the last batch it took.
        """
        held = self.claimed(batch)
        expected = held.next_offset if read_to is None else read_to
        if batch.start > expected:
            raise BrokenChain(f"{batch.topic}[{batch.partition}]: batch starts at {batch.start}, expected {expected}")
        return [record for record in batch.records if record.offset >= expected]

    async def apply(
        self,
        batch: Batch,
        effect: Callable[[Connection, Sequence[Record]], Awaitable[T]],
        refuse: Callable[[Connection, Record, str], Awaitable[None]],
    ) -> list[T]:
        """Commit the effect of the batch and the offset after it; returns the effect's outcomes.

        Records before the stored offset are skipped. A value that Postgres itself refuses is isolated by halving
        the batch and handed to `refuse`, with the offset in the same transaction. Transient errors are retried in
        place. Raises Fenced, BrokenChain, Stopping, Overburdened; any other error is a bug and must stop the worker.
        """
        fresh = self.fresh(batch)
        if batch.next_offset <= self.claimed(batch).next_offset:
            return []
        try:
            return [await self.step(batch, batch.next_offset, lambda c: effect(c, fresh), records=len(fresh))]
        except asyncpg.DataError as error:
            if len(fresh) == 1:
                detail = str(error)
                await self.step(batch, batch.next_offset, lambda c: refuse(c, fresh[0], detail))
                return []
        done: list[T] = []
        for half in replace(batch, records=fresh).split(len(fresh) // 2):
            if half is not None:
                try:
                    done += await self.apply(half, effect, refuse)
                except Overburdened as stopped:
                    raise Overburdened(str(stopped), [*done, *stopped.done]) from stopped.__cause__
        return done

    async def step(
        self,
        batch: Place,
        next_offset: int,
        effect: Callable[[Connection], Awaitable[T]],
        reached: Callable[[T], int] | None = None,
        records: int = 0,
    ) -> T:
        """One fenced transaction that moves the offset of the batch's partition forward, to next_offset.

        next_offset may equal the stored one: the fence is checked and the row locked, nothing moves; such an effect
        must be safe to repeat (compare-and-swap on state of its own). reached: where the effect's outcome allows the
        offset to go beyond that, in the same transaction. records: how many there are to try fewer of, if the effect
        keeps failing (Overburdened); 0: it is retried for as long as the failure may pass by itself.
        """
        partition = (batch.topic, batch.partition)
        held = self.claimed(batch)
        if next_offset < held.next_offset:
            raise ValueError(f"{batch.topic}[{batch.partition}]: {next_offset} lies before {held.next_offset}")
        wanted = Claim(next_offset, held.epoch)
        delay, in_a_row = _FIRST_BACKOFF, 0
        while True:
            outcome: _Done[T] | None = None
            in_effect = False
            try:
                async with (await self._pool()).acquire() as connection:
                    async with connection.transaction():
                        if not await self._swap(connection, partition, held, next_offset):
                            raise Fenced
                        in_effect = True
                        outcome = _Done(await effect(connection))
                        in_effect = False
                        further = max(next_offset, reached(outcome.value)) if reached else next_offset
                        if further > next_offset:
                            await self._swap(connection, partition, Claim(next_offset, held.epoch), further)
                            wanted = Claim(further, held.epoch)
                break
            except Exception as error:
                failure = failure_of(error, in_effect)
                in_a_row += in_effect
                reason = f"{type(error).__name__}: {error}"
                if in_effect and is_too_much(failure, in_a_row, records, self.patience):
                    raise Overburdened(reason) from error
                if failure is Failure.BUG or (failure is Failure.LIMIT and not is_transient(error)):
                    raise
                logger.warning("%s[%d]: %s; retrying", *partition, reason)
            delay = await self._back_off(delay)
            if outcome is not None and await self._committed(partition, held, wanted):
                break
            self.claimed(batch)
        if self._held.get(partition) == held:  # a newer claim may have landed meanwhile
            self._held[partition] = wanted
        return outcome.value

    async def rehearse(self, batch: Place, effect: Callable[[Connection], Awaitable[object]]) -> None:
        """Run the effect in a fenced transaction and take it back. What it raises is raised."""

        async def taken_back(connection: Connection) -> None:
            await effect(connection)
            raise _TakenBack

        with contextlib.suppress(_TakenBack):
            await self.step(batch, self.claimed(batch).next_offset, taken_back, records=1)

    async def _swap(self, connection: Connection, partition: Partition, held: Claim, next_offset: int) -> bool:
        """Move the stored offset, if it still is what this claim says."""
        swapped = await connection.fetchval(_SWAP, self._group, *partition, next_offset, held.next_offset, held.epoch)
        return swapped is not None

    async def _committed(self, partition: Partition, before: Claim, after: Claim) -> bool:
        """After an ambiguous COMMIT: did it happen? Raises Fenced when someone else has moved on."""
        row = await self.patiently(lambda c: c.fetchrow(_READ_BACK, self._group, *partition))
        found = Claim(row["next_offset"], row["epoch"])
        if found == before:
            return False  # not committed, or nothing moved and the effect is safe to repeat
        if found == after:
            return True
        raise Fenced

    async def patiently(self, query: Callable[[Connection], Awaitable[T]]) -> T:
        """A query outside of any fence; Postgres is waited for. Raises Stopping."""
        delay = _FIRST_BACKOFF
        while True:
            try:
                async with (await self._pool()).acquire() as connection, connection.transaction():
                    return await query(connection)
            except Exception as error:
                if not is_transient(error):
                    raise
                logger.warning("Postgres: %s: %s; retrying", type(error).__name__, error)
            delay = await self._back_off(delay)

    async def _back_off(self, delay: float) -> float:
        if self._stopping():
            raise Stopping
        await asyncio.sleep(delay)
        return min(delay * 2, _LONGEST_BACKOFF)


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    value: T


class _TakenBack(Exception):  # noqa: N818
    pass
