"""What has been published, as far as a restored database must know: the highest event_id and the highest seq."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from sinks.database import open_connection
from sinks.restore import Sequences, move_sequences
from streams import topics
from streams.kafka_clients import client_settings
from streams.settings import Settings

_TAIL = 10_000  # records of a partition: several rounds of the relay, within which ids are out of order
_OUTPUTS = (topics.TRIGGERS, topics.STATUS, topics.PROCESSED, topics.VALUATIONS, topics.DEAD_LETTERS)


class _HasSeq(msgspec.Struct):
    seq: int


_has_seq = msgspec.json.Decoder(_HasSeq)


async def after_restore(settings: Settings) -> tuple[Sequences, Sequences]:
    """Move the database's sequences past anything published; returns (found in Kafka, where they stand now)."""
    published = await _published(settings)
    async with open_connection(settings.dsn) as connection, connection.transaction():
        return published, await move_sequences(connection, published)


async def _published(settings: Settings) -> Sequences:
    event_id = seq = 0
    async for record in _tails(settings, [settings.topic(name) for name in _OUTPUTS]):
        event_id = max(event_id, int(dict(record.headers).get("event_id", b"0")))
        if record.topic == settings.topic(topics.TRIGGERS) and record.value:
            seq = max(seq, _has_seq.decode(record.value).seq)
    async for record in _tails(settings, [settings.topic(topics.JOBS)]):
        if record.value:
            seq = max(seq, _has_seq.decode(record.value).seq)
    return Sequences(event_id, seq)


async def _tails(settings: Settings, names: list[str]) -> AsyncIterator[Any]:
    """The last records of each partition."""
    consumer = AIOKafkaConsumer(**client_settings(settings), isolation_level="read_committed")
    await consumer.start()
    try:
        partitions = [
            TopicPartition(name, number) for name in names for number in sorted(await _partitions(consumer, name))
        ]
        starts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        consumer.assign(partitions)  # with nothing awaited before the seek, or a reset to the end may outrun it
        for partition in partitions:
            consumer.seek(partition, max(starts[partition], ends[partition] - _TAIL))
        while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, name: str) -> set[int]:
    found: set[int] | None = consumer.partitions_for_topic(name)
    if found is None:
        await consumer._client.add_topic(name)
        found = consumer.partitions_for_topic(name)
    if not found:
        raise topics.TopicError(f"topic {name} is missing: run `tidemark topics`")
    return found
