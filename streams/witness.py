"""The topic `tidemark-generation`: how far the relay has published, and which database may go on publishing.

Its log decides, since Postgres may lose what it has committed. It has one partition and two kinds of records:

* A *mark* precedes everything that a round of the relay publishes. So a database that knows the last mark's round has
  lost nothing that was published.
* A *fence* is written by whoever confirms a database, and says again what the last mark was. A relay whose mark does
  not follow its own one before does not publish: behind a fence of another database it never does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from sinks.generation import Installation, Mark
from streams import topics
from streams.kafka_clients import client_settings
from streams.log_reader import Log, open_log
from streams.settings import Settings

_MARK, _FENCE = b"mark", b"fence"
_TAIL = 1_000  # The last mark is among so many records, and so is a fence that no relay has answered yet.
_REQUEST_MS = 10_000


class Superseded(Exception):  # noqa: N818 - an outcome
    """Another relay, or another database, has published since; this one must not."""


class _Fence(msgspec.Struct, frozen=True):
    instance: str
    last: Mark | None = None


_decode_mark = msgspec.json.Decoder(Mark).decode
_decode_fence = msgspec.json.Decoder(_Fence).decode


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of the topic. mark: the furthest; fenced_by: the instance of the last fence; end: the next offset."""

    mark: Mark | None = None
    fenced_by: str | None = None
    end: int = 0

    def is_ahead_of(self, here: Installation) -> bool:
        """Whether something was published of which the database knows nothing."""
        return self.mark is not None and self.mark.place > here.place

    def supersedes(self, here: Installation) -> bool:
        """Whether another database than this confirmed one has been let in since."""
        return (self.mark is not None and self.mark.fence > here.fence) or self.fenced_by not in (None, here.instance)


async def read_tail(settings: Settings, before: int | None = None) -> Tail:
    """The end of the topic as it is now, or as it was before an offset. Raises KafkaError.

    What is neither mark nor fence is passed over.
    """
    async with open_log(settings, [settings.topic(topics.GENERATION)]) as log:
        return await tail_of(settings, log, before)


async def tail_of(settings: Settings, log: Log, before: int | None = None) -> Tail:
    """The same from a log that was opened with the topic, among others."""
    partition = TopicPartition(settings.topic(topics.GENERATION), 0)
    end = log.ends[partition]
    found = [record async for record in log.read({partition: end - _TAIL})]
    return read([record for record in found if before is None or record.offset < before], end)


def read(records: Iterable[Any], end: int = 0) -> Tail:
    """What some records say, in the order of the log."""
    found = Tail()
    for record in records:
        found = _with(found, record)
    return Tail(found.mark, found.fenced_by, end)


def _with(found: Tail, record: Any) -> Tail:
    try:
        if record.key == _MARK:
            return Tail(_furthest(found.mark, _decode_mark(record.value)), found.fenced_by)
        if record.key == _FENCE:
            fence = _decode_fence(record.value)
            return Tail(_furthest(found.mark, fence.last), fence.instance)
    except (msgspec.MsgspecError, TypeError, ValueError):
        pass  # Nobody but Tidemark may write here; a record of others says nothing.
    return found


def _furthest(known: Mark | None, mark: Mark | None) -> Mark | None:
    if mark is None:
        return known
    return mark if known is None or (mark.place, mark.done) >= (known.place, known.done) else known


async def set_fence(settings: Settings, instance: str, last: Mark | None) -> int:
    """Keep every relay from going on that does not know of this fence; returns its offset. Raises KafkaError.

    last: the furthest mark. However many fences follow, it stays among the last records.
    """
    producer = AIOKafkaProducer(**client_settings(settings), acks="all", request_timeout_ms=_REQUEST_MS)
    await producer.start()
    try:
        return await _send(producer, settings, _FENCE, msgspec.json.encode(_Fence(instance, last)))
    finally:
        await producer.stop()


async def send_mark(producer: AIOKafkaProducer, settings: Settings, mark: Mark) -> int:
    """Say that a round begins, or has ended; returns the mark's offset. Raises KafkaError."""
    return await _send(producer, settings, _MARK, msgspec.json.encode(mark))


async def _send(producer: AIOKafkaProducer, settings: Settings, key: bytes, value: bytes) -> int:
    batch = producer.create_batch()
    batch.append(timestamp=None, key=key, value=value)
    batch.close()
    sent = await (await producer.send_batch(batch, settings.topic(topics.GENERATION), partition=0))
    if sent.offset < 0:
        raise KafkaError("the broker does not say where it has put a record")
    return int(sent.offset)
