"""A trial: a process of its own reads one partition, record by record, at whose records workers have died.

`streams.trials` starts it under a claim that stays the worker's, with a limit on memory and a deadline for each step.
The offset of a record is named in Postgres (`sinks.suspects`) by the transaction that passes the one before, so before
the record is fetched or decoded: whatever it does to this process is its own doing. A record that keeps failing while
others pass is condemned: it becomes a dead letter, and its offset is passed in the same transaction.

What this process says goes to its standard output, an object per line.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import logging.config
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition

from sinks import suspects
from sinks.batches import Batch, Record
from sinks.database import Connection
from sinks.offsets import Claim, Fenced, Offsets, Partition, Stopping
from sinks.suspects import Suspect
from streams import logs, metrics
from streams.kafka_clients import client_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

FENCED = 75  # exit status
_FETCH_MS = 500
_NEIGHBOURS = 20  # offsets before the log's end, at one of which a record is to pass
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_LOOKS = 10  # at a log that should go on

_TIMEOUTS = """
select set_config('lock_timeout', $1, true),
       case when setting::int not between 1 and $3 then set_config('statement_timeout', $2, true) end
from pg_settings where name = 'statement_timeout'
"""


class Subject(Protocol):
    """What a topic's records are for, one at a time."""

    async def attempt(self, batch: Batch, alive: Callable[[], None]) -> None:
        """Apply a batch of one record, offset included. alive: to be called now and then by what takes long."""

    async def vouch(self, batch: Batch) -> bool:
        """Apply the record and take it back; whether it was one that can be applied."""

    async def condemn(self, connection: Connection, record: Record, detail: str) -> None:
        """What is left to do for a record that is passed over."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands in for a record that cannot even be fetched."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


def verdict_is_due(suspect: Suspect, attempts: int) -> bool:
    """Whether the record has failed often enough, each time just after another one had passed."""
    return suspect.deaths >= attempts


def is_unreadable(suspect: Suspect, attempts: int) -> bool:
    """Whether the process has died at the mere fetching of the record, for the verdict."""
    return suspect.deaths >= attempts + 2


class TrialOffsets(Offsets):
    """Names the next offset in the transaction that passes the one before; waits for locks only so long."""

    lock_ms = 0
    judging = False
    alive: Callable[[], None]

    async def _swap(self, connection: Connection, partition: Partition, held: Claim, next_offset: int) -> bool:
        await connection.execute(_TIMEOUTS, str(self.lock_ms), str(2 * self.lock_ms), 2 * self.lock_ms)
        swapped = await super()._swap(connection, partition, held, next_offset)
        if swapped and next_offset > held.next_offset and not self.judging:
            await suspects.passed(connection, self._group, partition, next_offset)
        return swapped

    async def _back_off(self, delay: float) -> float:
        self.alive()
        return await super()._back_off(delay)


class Reader:
    """The partition's records from an offset on."""

    def __init__(self, settings: Any, place: Partition) -> None:
        self._place = TopicPartition(*place)
        self._consumer = AIOKafkaConsumer(
            **client_settings(settings), isolation_level="read_committed", enable_auto_commit=False,
            auto_offset_reset="none", fetch_max_bytes=1, fetch_max_wait_ms=_FETCH_MS,
        )  # fmt: skip
        self._ahead: deque[Any] = deque()

    async def start(self, offset: int) -> None:
        """Connect."""
        await self._consumer.start()
        self._consumer.assign([self._place])
        self._consumer.seek(self._place, offset)

    async def look(self, count: int, looks: int = 1) -> Sequence[Any]:
        """Up to so many records, without passing them; fewer where none comes for so many looks."""
        while looks and (missing := count - len(self._ahead)) > 0:
            before = await self.position()
            found = await self._consumer.getmany(self._place, timeout_ms=_FETCH_MS, max_records=missing)
            self._ahead.extend(found.get(self._place, ()))
            if not found and await self.position() == before:
                looks -= 1
        return list(self._ahead)

    async def at(self, offset: int) -> Sequence[Any]:
        """The first record at or behind an offset; none where the log ends."""
        self.seek(offset)
        return await self.look(1, 2)

    def seek(self, offset: int) -> None:
        """Go on at an offset."""
        self._ahead.clear()
        self._consumer.seek(self._place, offset)

    async def end(self) -> int:
        """Where the log ends."""
        ends = await self._consumer.end_offsets([self._place])
        end: int = ends[self._place]
        return end

    def next(self) -> None:
        """Pass the first record."""
        self._ahead.popleft()

    async def position(self) -> int:
        """The offset behind all that was fetched."""
        position: int = await self._consumer.position(self._place)
        return position


class Trial:
    """Reads on until the records are passed that a worker may have had in hand when it died."""

    def __init__(self, app: Any, place: Partition, epoch: int, say: Callable[[dict[str, Any]], None]) -> None:
        self._place, self._say = place, say
        self._settings = app.settings
        self._group = app.settings.group(app.role)
        self._subject: Subject = app.trials.subjects[place[0]]
        self._offsets: TrialOffsets = app.offsets
        self._epoch = epoch
        self._reader = Reader(app.settings, place)
        self._others: Reader | None = None
        self._suspect = Suspect(0)
        self._pause = _FIRST_PAUSE

    async def run(self) -> None:
        """Until the end, or until this process dies of a record."""
        self._offsets.take_on(self._place, await self._offsets.recall(self._place, self._epoch))
        await self._name()
        self._offsets.alive()
        start = self._suspect.record_offset
        await self._reader.start(start)
        self._offsets.alive()
        until = min(await self._reader.end(), start + 2 * self._settings.batch_records)
        while self._stored < until:
            self._say({"at": self._stored})
            if is_unreadable(self._suspect, self._settings.poison_attempts):
                await self._condemn(Unread(*self._place, self._stored))
                self._reader.seek(self._stored)
                continue
            if verdict_is_due(self._suspect, self._settings.poison_attempts):
                await self._ask(suspects.vouch)  # whatever kills this process now is this record
            elif self._suspect.failure is not None and not await self._vouch():
                await self._wait()
            try:
                records = await self._reader.look(1, _LOOKS)
            except Exception as error:
                await self._unread(error)
                continue
            if not records:
                await self._offsets.step(self._batch(None), await self._reader.position(), _nothing)
                break
            await self._take(records[0])
        await self._ask(suspects.forget)
        self._say({"end": self._stored})

    @property
    def _stored(self) -> int:
        return self._offsets.claimed(self._batch(None)).next_offset

    def _batch(self, record: Any) -> Batch:
        held = self._offsets.held(self._place)
        assert held is not None
        return Batch(*self._place, self._epoch, held.next_offset, [] if record is None else [record])

    async def _name(self) -> None:
        self._suspect = await self._ask(suspects.name, self._stored)

    async def _take(self, record: Any) -> None:
        """The first record: applied, condemned, or left for another try."""
        if verdict_is_due(self._suspect, self._settings.poison_attempts):
            await self._condemn(record)
        elif await self._attempt(record):
            self._suspect = Suspect(self._stored, vouched=True)
            self._pause = _FIRST_PAUSE
        else:
            return
        self._reader.next()

    async def _unread(self, error: Exception) -> None:
        """The record could not be fetched: the broker's trouble is waited out, all else is the record's."""
        logger.error("%s[%d] at %d, in trial: %s: %s", *self._place, self._stored, type(error).__name__, error)
        if not getattr(error, "retriable", False):
            await self._failed(f"{type(error).__name__}: {error}")
        await self._wait()

    async def _failed(self, failure: str) -> None:
        await self._ask(suspects.fail, self._suspect.record_offset, failure)
        await self._name()

    async def _attempt(self, record: Any) -> bool:
        try:
            await self._subject.attempt(self._batch(record), self._offsets.alive)
            if self._stored > record.offset:
                return True
            failure = "it was not passed"
        except (Fenced, Stopping):
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            logger.exception("%s[%d] at %d, in trial", *self._place, record.offset)
        await self._failed(failure)
        return False

    async def _vouch(self) -> bool:
        """Whether another record passes here and now: one from the end of the log, each time the one before.

        Not the suspect's neighbours: they may be in the same fetch, which may be what no process survives.
        """
        suspect = self._suspect
        if self._others is None:
            self._others = Reader(self._settings, self._place)
            await self._others.start(suspect.record_offset)
        end = await self._others.end()
        if end <= suspect.record_offset + 1:
            logger.warning("%s[%d] at %d: no other record to compare with", *self._place, suspect.record_offset)
            return False
        await self._ask(suspects.try_neighbour)
        offset = end - 1 - suspect.neighbours % min(end - suspect.record_offset - 1, _NEIGHBOURS)
        try:
            found = await self._others.at(offset)
            passes = bool(found) and await self._subject.vouch(self._batch(found[0]))
        except (Fenced, Stopping):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning(
                "%s[%d] at %d: a record at %d fails too: %s", *self._place, suspect.record_offset, offset, reason
            )
            passes = False
        if passes:
            await self._ask(suspects.vouch)
        await self._name()
        self._say({"at": suspect.record_offset})
        return passes

    async def _wait(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._offsets.alive()

    async def _condemn(self, record: Any) -> None:
        """Pass the record over. At the hour's limit of verdicts something else is wrong, and the worker stops."""
        limit = self._settings.poison_verdicts_per_hour
        if await self._offsets.patiently(lambda c: suspects.verdicts(c, self._place[0])) >= limit:
            self._say({"limit": limit})
            os._exit(1)
        deaths, failure = self._suspect.deaths, self._suspect.failure
        detail = f"{failure}; {deaths} failures, while other records passed"
        after = max(record.offset, self._suspect.record_offset) + 1

        async def effect(connection: Connection) -> None:
            await self._subject.condemn(connection, record, detail)
            await suspects.condemn(connection, self._group, self._place, record.offset)
            await suspects.name(connection, self._group, self._place, after)

        self._offsets.judging = True
        await self._offsets.step(self._batch(None), after, effect)
        self._offsets.judging = False
        self._suspect = Suspect(after)
        self._say({"condemned": record.offset, "detail": detail})

    async def _ask(self, query: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        return await self._offsets.patiently(lambda c: query(c, self._group, self._place, *arguments))


async def _nothing(connection: Connection) -> None:
    """The offset alone."""


def _counted() -> dict[str, dict[str, float]]:
    """What this process has counted so far, for the worker to add to its own."""
    return {
        name: {json.dumps(s.labels): s.value for m in counter.collect() for s in m.samples if s.value}
        for name, counter in metrics.OF_TRIALS.items()
    }


async def _run(app: Any, place: Partition, epoch: int, say: Callable[[dict[str, Any]], None]) -> None:
    def fenced(place: Any) -> None:
        os._exit(FENCED)

    seconds = app.settings.trial_seconds
    offsets = TrialOffsets(app.pool, app.settings.group(app.role), lambda: False)
    offsets.patience = 1
    offsets.lock_ms = int(250 * seconds)
    offsets.alive = lambda: say({})
    app.offsets, app.fenced = offsets, fenced
    try:
        await Trial(app, place, epoch, say).run()
    except Fenced:
        fenced(place)
    os._exit(0)  # what is open needs no farewell


def main(role: str, topic: str, partition: str, epoch: str) -> None:
    """Run one trial of a role's partition in this process, under the claim that is named."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    app = importlib.import_module(f"streams.{role}").app
    settings = app.settings
    limit = settings.trial_memory_mb << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if settings.log_format == "json":
        logging.config.dictConfig(logs.configuration())
    else:
        logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [trial] [%(levelname)s] %(message)s")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing

    def say(message: dict[str, Any]) -> None:
        signal.setitimer(signal.ITIMER_REAL, settings.trial_seconds)
        print(json.dumps({**message, "counted": _counted()}), file=output, flush=True)

    say({})
    asyncio.run(_run(app, (topic, int(partition)), int(epoch), say))


if __name__ == "__main__":
    main(*sys.argv[1:])
