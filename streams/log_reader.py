"""Reading some topics from given places to their present ends, outside of any consumer group."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from streams.kafka_clients import client_settings
from streams.settings import Settings
from streams.topics import TopicError


class Log:
    """Some topics' partitions as they were when they were opened: `starts` and `ends` of what they hold."""

    def __init__(self, consumer: AIOKafkaConsumer, starts: dict[Any, int], ends: dict[Any, int]) -> None:
        self._consumer = consumer
        self.starts: Mapping[Any, int] = starts
        self.ends: Mapping[Any, int] = ends

    async def read(self, places: Mapping[Any, int]) -> AsyncIterator[Any]:
        """The records of the partitions from the places on; a place before the log's start begins there."""
        for partition, place in places.items():
            self._consumer.seek(partition, max(place, self.starts[partition]))
        others = self.ends.keys() - places.keys()
        self._consumer.pause(*others)
        while any([await self._consumer.position(each) < self.ends[each] for each in places]):
            for records in (await self._consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record
        self._consumer.resume(*others)


@asynccontextmanager
async def open_log(settings: Settings, names: Sequence[str]) -> AsyncIterator[Log]:
    """The topics as they are now. Raises TopicError for one that is missing, KafkaError when no broker answers."""
    consumer = AIOKafkaConsumer(**client_settings(settings), auto_offset_reset="earliest", fetch_max_wait_ms=100)
    await consumer.start()
    try:
        partitions = [
            TopicPartition(name, number) for name in names for number in sorted(await _partitions(consumer, name))
        ]
        starts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        consumer.assign(partitions)  # With nothing awaited before the seek, or a reset to the end may outrun it.
        yield Log(consumer, starts, ends)
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, name: str) -> set[int]:
    found: set[int] | None = consumer.partitions_for_topic(name)
    if found is None:
        await consumer._client.add_topic(name)
        found = consumer.partitions_for_topic(name)
    if not found:
        raise TopicError(f"topic {name} is missing: run `tidemark topics`")
    return found
