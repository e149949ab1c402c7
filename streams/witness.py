"""The topic `tidemark-generation`: how far the relay has published, and which database may go on publishing.

Its log decides, since Postgres may lose what it has committed. It has one partition and two kinds of records:

* A *mark* precedes everything that a round of the relay publishes. So a database that knows the last mark's round has
  lost nothing that was published.
* A *fence* is written by whoever confirms a database. A relay whose mark does not follow its own one before does not
  publish: behind a fence of another database it never does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from sinks.generation import Installation
from sinks.reannounce import Mark
from streams import topics
from streams.kafka_clients import client_settings
from streams.log_reader import open_log
from streams.settings import Settings

_MARK, _FENCE = b"mark", b"fence"
_TAIL = 1_000  # The last mark is among so many records, and so is a fence that no relay has answered yet.
_REQUEST_MS = 10_000

_Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Superseded(Exception):  # noqa: N818 - an outcome
    """Another relay, or another database, has published since; this one must not."""


class _Mark(msgspec.Struct, frozen=True):
    fence: Annotated[int, msgspec.Meta(ge=-1, le=2**62)]
    round: _Number
    generation: Annotated[int, msgspec.Meta(ge=0, le=2_000)]
    event_id: _Number
    seq: _Number
    done: bool = False


class _Fence(msgspec.Struct, frozen=True):
    instance: str


_decode_mark = msgspec.json.Decoder(_Mark).decode
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


async def read_tail(settings: Settings) -> Tail:
    """The end of the topic as it is now. What is neither mark nor fence is passed over. Raises KafkaError."""
    async with open_log(settings, [settings.topic(topics.GENERATION)]) as log:
        ((partition, end),) = log.ends.items()
        return read([record async for record in log.read({partition: end - _TAIL})], end)


def read(records: Iterable[Any], end: int = 0) -> Tail:
    """What some records say, in the order of the log."""
    found = Tail()
    for record in records:
        found = _with(found, record)
    return Tail(found.mark, found.fenced_by, end)


def _with(found: Tail, record: Any) -> Tail:
    try:
        if record.key == _MARK:
            mark = Mark(**msgspec.structs.asdict(_decode_mark(record.value)))
            if found.mark is None or (mark.place, mark.done) >= (found.mark.place, found.mark.done):
                return Tail(mark, found.fenced_by)
        elif record.key == _FENCE:
            return Tail(found.mark, _decode_fence(record.value).instance)
    except (msgspec.MsgspecError, TypeError, ValueError):
        pass  # Nobody but Tidemark may write here; a record of others says nothing.
    return found


async def set_fence(settings: Settings, instance: str) -> int:
    """Keep every relay from going on that does not know of this fence; returns its offset. Raises KafkaError."""
    producer = AIOKafkaProducer(**client_settings(settings), acks="all", request_timeout_ms=_REQUEST_MS)
    await producer.start()
    try:
        return await _send(producer, settings, _FENCE, msgspec.json.encode(_Fence(instance)))
    finally:
        await producer.stop()


async def send_mark(producer: AIOKafkaProducer, settings: Settings, mark: Mark) -> int:
    """Say that a round begins, or has ended; returns the mark's offset. Raises KafkaError."""
    value = _Mark(mark.fence, mark.round, mark.generation, mark.event_id, mark.seq, mark.done)
    return await _send(producer, settings, _MARK, msgspec.json.encode(value))


async def _send(producer: AIOKafkaProducer, settings: Settings, key: bytes, value: bytes) -> int:
    batch = producer.create_batch()
    batch.append(timestamp=None, key=key, value=value)
    batch.close()
    sent = await (await producer.send_batch(batch, settings.topic(topics.GENERATION), partition=0))
    if sent.offset < 0:
        raise KafkaError("the broker does not say where it has put a record")
    return int(sent.offset)
