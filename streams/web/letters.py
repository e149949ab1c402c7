"""The dead letters: read from their topic by a consumer of its own, and sent again after repair."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from sinks.resubmission import Resubmission, resubmit, resubmitted
from streams import records, topics
from streams.app import App
from streams.kafka_clients import client_settings
from streams.metrics import DEAD_LETTER_REASONS as REASONS
from streams.records import Rejected
from streams.web.problems import Problem, unavailable

_WINDOW = 2_000  # of each partition, the newest
_READ_SECONDS = 10.0
_DECODERS: Mapping[str, Callable[[bytes | None], Any]] = {
    topics.BUSINESS_DATES: records.decode_business_date,
    topics.PRICES: records.decode_price,
    topics.TRANSACTIONS: records.decode_transaction,
}


@dataclass(frozen=True, slots=True)
class Letter:
    """A refused record. partition, offset: its place in dead-letters; source_…: where it was refused.

    value: as text, undecodable bytes as \\xNN; None: a tombstone. truncated: its length where it was cut.
    """

    partition: int
    offset: int
    refused_at: datetime
    reason: str
    detail: str
    topic: str
    source_partition: int
    source_offset: int
    key: str | None
    value: str | None
    is_text: bool
    truncated: int | None
    resubmitted_by: str | None

    @property
    def place(self) -> str:
        """partition:offset."""
        return f"{self.partition}:{self.offset}"


class Letters:
    """Reads the newest letters of each partition at every call: they are few, and the topic is the only truth."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._prefix = app.settings.topic_prefix
        self._topic = app.settings.topic(topics.DEAD_LETTERS)

    async def latest(self, limit: int, reason: str | None = None) -> list[Letter]:
        """Newest first."""
        if reason is not None and reason not in REASONS:
            raise Problem("invalid", f"reason: one of {', '.join(REASONS)}, got {reason!r}")
        async with self._consumer() as consumer:
            places = [TopicPartition(self._topic, p) for p in sorted(consumer.partitions_for_topic(self._topic) or ())]
            starts, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
            consumer.assign(places)
            for place in places:
                consumer.seek(place, max(starts[place], ends[place] - _WINDOW))
            raw = await self._read(consumer, ends)
        sent = await self._resubmitted()
        found = [self._letter(record, sent) for record in raw]
        wanted = [letter for letter in found if reason in (None, letter.reason)]
        return sorted(wanted, key=lambda letter: letter.refused_at, reverse=True)[:limit]

    async def one(self, partition: int, offset: int) -> Letter:
        """Raises Problem `not-found`."""
        return self._letter(await self._fetch(partition, offset), await self._resubmitted())

    async def resubmit(self, actor: str, partition: int, offset: int, value: str | None) -> None:
        """Send the record again; with another value, which must at least be readable. Raises Problem."""
        raw = await self._fetch(partition, offset)
        letter = self._letter(raw, {})
        if value is None and letter.truncated is not None:
            raise Problem("refused", "the record was cut when it was refused: give its whole value")
        again = raw.value if value is None else value.encode()
        decode = _DECODERS.get(letter.topic)
        if decode is None or again is None:
            raise Problem("refused", f"records of {letter.topic} without a value are not sent again")
        if letter.reason != "poison":  # what has killed workers is not tried in this one
            try:
                decode(again)
            except Rejected as error:
                raise Problem("refused", f"it would be refused again: {error}") from None
        record = Resubmission(letter.topic, raw.key, again, partition, offset)
        async with (await self._app.pool()).acquire() as connection:
            await resubmit(connection, actor, record)
        self._app.outbox_written()

    async def _fetch(self, partition: int, offset: int) -> Any:
        async with self._consumer() as consumer:
            place = TopicPartition(self._topic, partition)
            known = partition in (consumer.partitions_for_topic(self._topic) or ())
            bounds = (
                ((await consumer.beginning_offsets([place]))[place], (await consumer.end_offsets([place]))[place])
                if known
                else (0, 0)
            )
            if bounds[0] <= offset < bounds[1]:
                consumer.assign([place])
                consumer.seek(place, offset)
                for record in await self._read(consumer, {place: offset + 1}):
                    if record.offset == offset:
                        return record
        raise Problem("not-found", f"there is no dead letter {partition}:{offset} (any more)")

    async def _read(self, consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]) -> list[Any]:
        found: list[Any] = []
        deadline = time.monotonic() + _READ_SECONDS
        while any([await consumer.position(place) < end for place, end in ends.items()]):
            if time.monotonic() > deadline:
                raise unavailable("the dead letters could not be read in time")
            for batch in (await consumer.getmany(timeout_ms=100)).values():
                found += batch
        return found

    async def _resubmitted(self) -> dict[str, str]:
        async with (await self._app.pool()).acquire() as connection:
            return await resubmitted(connection)

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            self._topic,
            **client_settings(self._app.settings),
            enable_auto_commit=False,
            isolation_level="read_committed",
            fetch_max_wait_ms=100,
        )
        try:
            async with asyncio.timeout(_READ_SECONDS):
                await consumer.start()
            consumer.unsubscribe()
            yield consumer
        except (KafkaError, TimeoutError) as error:
            raise unavailable(f"the broker does not answer: {type(error).__name__}") from error
        finally:
            await consumer.stop()

    def _letter(self, record: Any, sent: Mapping[str, str]) -> Letter:
        headers = {name: value.decode(errors="replace") for name, value in record.headers}
        value, is_text = _text(record.value)
        return Letter(
            partition=record.partition,
            offset=record.offset,
            refused_at=datetime.fromtimestamp(record.timestamp / 1000, UTC),
            reason=headers.get("reason", ""),
            detail=headers.get("detail", ""),
            topic=headers.get("topic", "").removeprefix(self._prefix),
            source_partition=int(headers.get("partition", -1)),
            source_offset=int(headers.get("offset", -1)),
            key=_text(record.key)[0],
            value=value,
            is_text=is_text,
            truncated=int(headers["truncated"]) if "truncated" in headers else None,
            resubmitted_by=sent.get(f"{record.partition}:{record.offset}"),
        )


def _text(raw: bytes | None) -> tuple[str | None, bool]:
    if raw is None:
        return None, False
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="backslashreplace"), False
