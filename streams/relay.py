"""The outbox relay: publishes what waits in Postgres, in order per message key, and deletes what the broker acked.

Delivery is at least once: a crash between ack and delete publishes again, under the same event_id.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from sinks import outbox
from sinks.database import Connection, is_transient
from streams import metrics
from streams.kafka_clients import client_settings
from streams.settings import Settings

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_FOLLOWER_SECONDS = 2.0
_EVENTS_AT_ONCE = 2_000


class Relay:
    """Leads or stands by until `stopping`; nothing is lost whichever way it ends."""

    def __init__(self, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._settings = settings
        self._stopping = stopping
        self._work = asyncio.Event()

    async def run(self) -> None:
        """Relay until stopping; reconnects by itself."""
        while not self._stopping():
            try:
                async with outbox.leadership(self._settings.dsn) as connection:
                    if connection is not None:
                        await self._lead(connection)
            except Exception as error:
                if not (is_transient(error) or isinstance(error, KafkaError)):
                    raise
                logger.warning("relay: %s: %s; retrying", type(error).__name__, error)
            await asyncio.sleep(0 if self._stopping() else _FOLLOWER_SECONDS)

    async def _lead(self, connection: Connection) -> None:
        producer = AIOKafkaProducer(
            **client_settings(self._settings),
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            max_request_size=2 * 1024 * 1024,
        )
        await producer.start()
        try:
            await connection.add_listener(outbox.CHANNEL, lambda *_: self._work.set())
            logger.info("relay leads")
            while not self._stopping():
                self._work.clear()
                if await self._publish(producer, connection) == 0:
                    await self._wait()
        finally:
            await producer.stop()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await self._work.wait()
        except TimeoutError:
            pass

    async def _publish(self, producer: AIOKafkaProducer, connection: Connection) -> int:
        """Publish what waits; returns how many events the broker acknowledged."""
        events = await outbox.read(connection, _EVENTS_AT_ONCE)
        acked: list[int] = []
        try:
            # Sends of one key go out in order (idempotent producer); a failure stops that key only.
            chains = defaultdict(list)
            for event in events:
                chains[event.topic, event.key if event.key is not None else event.id].append(event)
            for chain in await asyncio.gather(*(self._publish_key(producer, chain) for chain in chains.values())):
                acked += chain
        finally:
            if acked:
                await outbox.delete(connection, acked)
        metrics.OUTBOX_PUBLISHED.inc(len(acked))
        return len(acked)

    async def _publish_key(self, producer: AIOKafkaProducer, events: Sequence[outbox.OutboxEvent]) -> list[int]:
        sent: list[asyncio.Future[object]] = []
        acked: list[int] = []
        try:
            for event in events:  # in order: not a comprehension, so that what was sent is known on an error
                sent.append(await self._send(producer, event))  # noqa: PERF401
            for event, future in zip(events, sent, strict=True):
                await future
                acked.append(event.id)
        except KafkaError as error:
            blocked = events[len(acked)]
            logger.warning("event %d to %s: %s; its key is held back", blocked.id, blocked.topic, error)
            await asyncio.gather(*sent, return_exceptions=True)
        return acked

    async def _send(self, producer: AIOKafkaProducer, event: outbox.OutboxEvent) -> asyncio.Future[object]:
        headers = [(name, value.encode()) for name, value in event.headers.items()]
        headers.append(("event_id", str(event.id).encode()))
        topic = self._settings.topic(event.topic)
        future: asyncio.Future[object] = await producer.send(topic, key=event.key, value=event.value, headers=headers)
        return future
