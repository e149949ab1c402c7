"""Reading a topic from its newest records back, within bounds: one fetch is in memory, however large the records."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streams import garbage
from streams.kafka_clients import client_settings
from streams.settings import Settings
from streams.web.problems import unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS = 10.0
_STOP_SECONDS = 5.0
_FETCH_BYTES = 4 * 2**20  # the broker gives one record more where it alone is larger
_AT_ONCE = 2  # readers in one worker; others wait for their turn
_CHUNK_BYTES = 16 * 2**20
_FIRST_CHUNK, _LARGEST_CHUNK = 4, 512
_MOST_BYTES = 64 * 2**20
_MOST_RECORDS = 2_000


@dataclass(slots=True)
class _Tail(Generic[T]):
    """A partition. first, below: the offsets not read yet; found: read and not given yet, newest last."""

    place: TopicPartition
    first: int
    below: int
    chunk: int = _FIRST_CHUNK
    found: list[tuple[int, int, T]] = field(default_factory=list)  # (offset, timestamp, what is kept)

    @property
    def next(self) -> int:
        """All before this offset is still to come."""
        return self.found[-1][0] + 1 if self.found else self.below


class Backwards(Generic[T]):
    """The records of a topic, newest first over all partitions, each partition's in its own order.

    keep: makes of a record what is worth keeping, at once. It ends at the topic's beginning, or when it has read as
    much as one look may: `cursor` says where the next look goes on. late: whether the time was up.
    """

    def __init__(self, reader: Reader, tails: list[_Tail[T]], keep: Callable[[Any], T]) -> None:
        self._reader = reader
        self._tails = tails
        self._keep = keep
        self._records, self._bytes = 0, 0
        self.late = False

    async def __aiter__(self) -> AsyncIterator[T]:
        for tail in self._tails:
            if not await self._fill(tail):
                break
        while waiting := [tail for tail in self._tails if tail.found]:
            newest = max(waiting, key=lambda tail: tail.found[-1][1])
            yield newest.found.pop()[2]
            if not newest.found and not await self._fill(newest):
                return

    @property
    def cursor(self) -> list[int] | None:
        """Per partition: the next look begins before this offset. None: there is nothing more."""
        if all(not tail.found and tail.below <= tail.first for tail in self._tails):
            return None
        return [tail.next for tail in self._tails]

    async def _fill(self, tail: _Tail[T]) -> bool:
        """Read what comes before; False when this look has read enough."""
        while not tail.found and tail.below > tail.first:
            if self._records >= _MOST_RECORDS or self._bytes >= _MOST_BYTES:
                return False
            start = max(tail.first, tail.below - tail.chunk)
            size = 0
            try:
                async for record in self._reader.between(tail.place, start, tail.below):
                    tail.found.append((record.offset, record.timestamp, self._keep(record)))
                    size += len(record.value or b"") + len(record.key or b"")
            except TimeoutError:  # the newest of these offsets are missing: the next look reads them again
                tail.found.clear()
                self.late = True
                return False
            tail.below = start
            self._records += max(1, len(tail.found))
            self._bytes += size
            average = size // max(1, len(tail.found)) or _CHUNK_BYTES // (2 * tail.chunk)
            tail.chunk = max(1, min(_LARGEST_CHUNK, 2 * tail.chunk, _CHUNK_BYTES // average))
        return True


class Reader:
    """A consumer of its own for one look at a topic. partitions: the topic's, in order."""

    def __init__(self, consumer: AIOKafkaConsumer, topic: str, partitions: list[int], deadline: float) -> None:
        self._consumer = consumer
        self._topic = topic
        self.partitions = partitions
        self._deadline = deadline

    async def backwards(self, cursor: list[int] | None, keep: Callable[[Any], T]) -> Backwards[T]:
        """From the cursor of an earlier look, or from the end."""
        places = [TopicPartition(self._topic, partition) for partition in self.partitions]
        firsts, ends = await self._consumer.beginning_offsets(places), await self._consumer.end_offsets(places)
        before = dict(zip(places, cursor or [], strict=False))
        tails: list[_Tail[T]] = [
            _Tail(place, firsts[place], min(ends[place], before.get(place, ends[place]))) for place in places
        ]
        return Backwards(self, tails, keep)

    async def one(self, partition: int, offset: int) -> Any | None:
        """The record at an offset; None where there is none."""
        if partition not in self.partitions:
            return None
        place = TopicPartition(self._topic, partition)
        first = (await self._consumer.beginning_offsets([place]))[place]
        end = (await self._consumer.end_offsets([place]))[place]
        if first <= offset < end:
            async for record in self.between(place, offset, offset + 1):
                return record
        return None

    async def between(self, place: TopicPartition, start: int, end: int) -> AsyncIterator[Any]:
        """The records from start up to before end, fewer than end - start where some are hidden or were removed.

        Raises TimeoutError.
        """
        self._consumer.seek(place, start)
        self._consumer.resume(place)
        try:
            while await self._consumer.position(place) < end:
                if time.monotonic() > self._deadline:
                    raise TimeoutError
                batches: Mapping[TopicPartition, list[Any]]
                batches = await self._consumer.getmany(place, timeout_ms=100, max_records=16)
                for record in batches.get(place, ()):
                    if record.offset >= end:
                        return
                    yield record
        finally:
            self._consumer.pause(place)


class Topic:
    """Opens readers, few at a time, so that many who look cost no more memory than few."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[Reader]:
        """Raises Problem `unavailable` where the broker does not answer in time."""
        try:
            async with asyncio.timeout(_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise unavailable("others are reading the same") from None
        try:
            async with self._consumer() as reader:
                yield reader
        finally:
            self._turns.release()

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[Reader]:
        deadline = time.monotonic() + _SECONDS
        consumer = AIOKafkaConsumer(
            **client_settings(self._settings),
            enable_auto_commit=False,
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_bytes=_FETCH_BYTES,
        )
        try:
            async with asyncio.timeout(_SECONDS):
                await consumer.start()
                await consumer._client.set_topics((self._name,))
            partitions = sorted(consumer.partitions_for_topic(self._name) or ())
            # Assigned once and for all: stop() hangs when it follows soon on a change of what is assigned.
            consumer.assign(places := [TopicPartition(self._name, partition) for partition in partitions])
            consumer.pause(*places)
            yield Reader(consumer, self._name, partitions, deadline)
        except (KafkaError, TimeoutError) as error:
            raise unavailable(f"the broker does not answer: {type(error).__name__}") from error
        finally:
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await consumer.stop()
            except TimeoutError:
                logger.warning("the client that read %s did not stop in time", self._name)
            garbage.look_now()  # a client is full of cycles, on which what it has fetched hangs
