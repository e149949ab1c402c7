"""Consumer lag of every group, in records and in seconds: what Postgres and Kafka hold as positions, against the log.

Measured by clients of its own, never through Faust's consumer thread, so any process can ask: a worker of another
group, or `tidemark lag` while no worker is alive. A partition that nobody has read yet stands at the log's beginning.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
)
from aiokafka.structs import OffsetAndMetadata

from sinks.database import Connection
from sinks.monitor import read_positions
from streams import topics
from streams.kafka_clients import client_settings
from streams.settings import Settings

_FETCH_SECONDS = 5.0
_COORDINATOR_SECONDS = 15.0
_FETCH_BYTES = 4096  # a broker returns at least one record batch, however large


class LagUnknown(Exception):  # noqa: N818 - an outcome
    """The broker does not answer; one line says why."""


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """One partition of one group.

    position: the offset that is read next; None where the group has never read. end_offset: the end of what a
    read-committed consumer may read. lag: records from the first unread one to the end, at most (offsets lost to
    compaction count). lag_seconds: now minus the timestamp of the first unread record; 0 where nothing is unread.
    """

    consumergroup: str
    topic: str
    partition: int
    position: int | None
    end_offset: int
    lag: int
    lag_seconds: float


@dataclass(frozen=True, slots=True)
class _Unread:
    """The first record at or after a position. None of both: there are only markers and holes up to the end."""

    offset: int | None
    timestamp_ms: int | None


OWNED_BY_POSTGRES = ("intake", "resets")
"""The roles whose offsets are in Postgres, so that Kafka is not asked for them."""


def topics_by_group(settings: Settings) -> dict[str, list[str]]:
    """What each consumer group reads."""
    names = {
        "intake": [topics.BUSINESS_DATES, topics.PRICES, topics.TRANSACTIONS],
        "triggers": [topics.TRIGGERS, topics.STATUS],
        "resets": [topics.JOBS],
        "books": [topics.STATUS],
    }
    return {settings.group(role): [settings.topic(name) for name in read] for role, read in names.items()}


class LagReader:
    """An async context manager; `read` as often as wanted, one call at a time."""

    def __init__(self, settings: Settings) -> None:
        self._groups = topics_by_group(settings)
        self._owned_by_postgres = {settings.group(role) for role in OWNED_BY_POSTGRES}
        self._admin = AIOKafkaAdminClient(**client_settings(settings), request_timeout_ms=10_000)
        self._consumer = AIOKafkaConsumer(
            **client_settings(settings),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=100,
            request_timeout_ms=10_000,
        )
        self._found: dict[tuple[TopicPartition, int], _Unread] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._admin.start()
            await self._consumer.start()
        except (KafkaError, OSError) as error:
            await self._close()
            raise LagUnknown(f"cannot reach the broker: {error or type(error).__name__}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await self._consumer.stop()
        await self._admin.close()

    async def read(self, connection: Connection) -> list[PartitionLag]:
        """Every partition of every group's topics, sorted. Raises LagUnknown, and Postgres' errors."""
        try:
            return await self._read(connection)
        except (KafkaError, TimeoutError) as error:
            raise LagUnknown(f"the broker does not answer: {error or type(error).__name__}") from error

    async def _read(self, connection: Connection) -> list[PartitionLag]:
        # Positions first, ends after: a position is never beyond the end read after it.
        stored = await read_positions(connection)
        positions = {group: await self._positions(group, stored) for group in self._groups}
        partitions = await self._partitions()
        starts: Mapping[TopicPartition, int] = await self._consumer.beginning_offsets(partitions)
        ends: Mapping[TopicPartition, int] = await self._consumer.end_offsets(partitions)
        wanted = [
            (group, tp, positions[group].get(tp))
            for group, names in self._groups.items()
            for tp in partitions
            if tp.topic in names
        ]
        places = {(tp, max(position or 0, starts[tp])) for _, tp, position in wanted}
        await self._look_up({place for place in places if place[1] < ends[place[0]]}, ends)
        return sorted(
            (self._lag(group, tp, position, starts[tp], ends[tp]) for group, tp, position in wanted),
            key=lambda found: (found.consumergroup, found.topic, found.partition),
        )

    def _lag(self, group: str, tp: TopicPartition, position: int | None, start: int, end: int) -> PartitionLag:
        unread = self._found.get((tp, max(position or 0, start)), _Unread(None, None))
        if unread.offset is None or unread.timestamp_ms is None:
            return PartitionLag(group, tp.topic, tp.partition, position, end, 0, 0.0)
        seconds = max(0.0, time.time() - unread.timestamp_ms / 1000)
        return PartitionLag(group, tp.topic, tp.partition, position, end, end - unread.offset, seconds)

    async def _positions(self, group: str, stored: Mapping[tuple[str, str, int], int]) -> dict[TopicPartition, int]:
        if group in self._owned_by_postgres:
            return {TopicPartition(t, p): offset for (owner, t, p), offset in stored.items() if owner == group}
        committed = await self._committed(group)
        return {tp: found.offset for tp, found in committed.items() if found.offset >= 0}

    async def _committed(self, group: str) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """Of a fresh cluster, the first question makes the broker create what it needs to answer it."""
        async with asyncio.timeout(_COORDINATOR_SECONDS):
            while True:
                try:
                    found: Mapping[TopicPartition, OffsetAndMetadata]
                    found = await self._admin.list_consumer_group_offsets(group)
                    return found
                except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError):
                    await asyncio.sleep(0.2)

    async def _partitions(self) -> list[TopicPartition]:
        names = sorted({name for names in self._groups.values() for name in names})
        described = await self._admin.describe_topics(names)
        return [
            TopicPartition(topic["topic"], partition["partition"])
            for topic in described
            for partition in topic["partitions"]
        ]

    async def _look_up(self, places: set[tuple[TopicPartition, int]], ends: Mapping[TopicPartition, int]) -> None:
        """Find the first record at or after each place; what is known from the last time is kept."""
        self._found = {
            place: found for place, found in self._found.items() if place in places and found.offset is not None
        }
        missing = places - self._found.keys()
        while missing:  # two groups may stand at different places of one partition: one after the other
            at_once = dict(sorted(missing, reverse=True))
            self._found.update(await self._first_records(at_once, ends))
            missing -= set(at_once.items())

    async def _first_records(
        self, places: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
    ) -> dict[tuple[TopicPartition, int], _Unread]:
        consumer = self._consumer
        consumer.assign(list(places))
        for tp, offset in places.items():
            consumer.seek(tp, offset)
        found: dict[tuple[TopicPartition, int], _Unread] = {}
        waiting = set(places)
        deadline = time.monotonic() + _FETCH_SECONDS + len(places)
        while waiting:
            if time.monotonic() > deadline:  # a timeout's cancellation could get lost in the client
                raise TimeoutError("records at the positions could not be read in time")
            fetched = await consumer.getmany(*waiting, timeout_ms=200)
            for tp in list(waiting):
                if records := fetched.get(tp):
                    found[tp, places[tp]] = _Unread(records[0].offset, records[0].timestamp)
                elif await consumer.position(tp) >= ends[tp]:
                    found[tp, places[tp]] = _Unread(None, None)
                else:
                    continue
                waiting.discard(tp)
                consumer.pause(tp)  # not unsubscribed: aiokafka's stop() would hang when it follows soon
        return found


async def read_lag(settings: Settings, connection: Connection) -> list[PartitionLag]:
    """One look, with clients opened and closed again. Raises LagUnknown."""
    async with LagReader(settings) as reader:
        return await reader.read(connection)
