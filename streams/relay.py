"""The outbox relay: publishes what waits in Postgres, in order per message key, and deletes what the broker acked.

One relay leads, others stand by for its session to end. Delivery is at least once: a crash between ack and delete
publishes again, under the same event_id. A relay that has lost its session without knowing may still publish what it
has read, in order, while the next leader publishes the same rows: so a consumer that ignores, per key, every id that
it has passed sees each message once and in order.

One batch of a partition is on its way at a time, and nothing follows on one that failed: otherwise a later id could
overtake an earlier one. That is also why the producer's own batching and idempotence are not used: retries make
duplicates, which ids make harmless, and an idempotent producer never gives up, nor goes on after a refused batch.

Each round is marked before its first message is sent (`streams/marks.py`), so that a Postgres which loses its last
commits can be told from one that knows all that was published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError
from aiokafka.partitioner import DefaultPartitioner

from sinks import outbox
from sinks.database import Connection, is_transient
from sinks.outbox import OutboxEvent
from streams import logs, metrics
from streams.kafka_clients import client_settings
from streams.marks import Marks
from streams.settings import Settings
from streams.topics import TopicError
from streams.tracing import Traces
from streams.witness import Superseded

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_RETRY_SECONDS = 0.5
_RETRY_HELD_SECONDS = 60.0
_SILENT_SECONDS = 60.0  # a leader that publishes speaks to Postgres at least every _ROUND_SECONDS
_ROUND_SECONDS = 20.0
_REQUEST_MS = 10_000
_LAST_MARK_SECONDS = 3.0
_MISSING_TOPIC_SECONDS = 30.0
_ROWS = 2_000
_BYTES = 16 * 1024 * 1024
_BATCH_BYTES = 512 * 1024

_UNPUBLISHABLE = (MessageSizeTooLargeError, RecordListTooLargeError)

Lane = tuple[str, int]


@dataclass(slots=True)
class Round:
    """What became of the messages of one round: acked, and unpublishable with the reason."""

    acked: list[OutboxEvent] = field(default_factory=list)
    refused: list[tuple[OutboxEvent, str]] = field(default_factory=list)


class Publisher:
    """Sends messages to the broker, lane by lane: a lane is a partition of a topic."""

    def __init__(self, settings: Settings, traces: Traces) -> None:
        self._settings = settings
        self._traces = traces
        self._partitioner = DefaultPartitioner()
        self._missing: dict[str, float] = {}  # topics that are not there, and when to look again
        self._producer = AIOKafkaProducer(
            **client_settings(settings),
            acks="all",
            request_timeout_ms=_REQUEST_MS,
            max_batch_size=_BATCH_BYTES,
        )
        self.marks = Marks(settings, self._producer)

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        await self._producer.start()

    async def stop(self) -> None:
        """Disconnect; what is on its way is given the time of a request, and is in the outbox still."""
        try:
            async with asyncio.timeout(_REQUEST_MS / 1000):
                await self._producer.stop()
        except TimeoutError:
            await self._producer._sender.close()
            await self._producer.client.close()

    async def publish(self, connection: Connection, events: Sequence[OutboxEvent]) -> Round:
        """Send the messages, behind a mark; what neither is acked nor refused may be sent again.

        connection: that they were read on. Raises Superseded, and then has sent nothing.
        """
        done = Round()
        if not events:
            return done
        await self.marks.begin(connection)
        lanes = await self._lanes(events)
        end = time.monotonic() + _ROUND_SECONDS
        outcomes = await asyncio.gather(
            *(self._send(lane, waiting, done, end) for lane, waiting in lanes.items()), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, KafkaError):
                logger.warning("publishing: %s: %s; trying again", type(outcome).__name__, outcome)
            elif outcome is not None:
                raise outcome
        return done

    async def _lanes(self, events: Sequence[OutboxEvent]) -> dict[Lane, deque[OutboxEvent]]:
        """Where the messages belong, by the rule of Kafka's own clients; those of a topic that is not there stay."""
        partitions = {topic: await self._partitions(topic) for topic in {event.topic for event in events}}
        lanes: dict[Lane, deque[OutboxEvent]] = defaultdict(deque)
        known: dict[tuple[str, bytes], int] = {}
        for event in events:
            of_topic = partitions[event.topic]
            if not of_topic:
                continue
            if event.key is None:
                partition = of_topic[event.id % len(of_topic)]
            elif (partition := known.get((event.topic, event.key), -1)) < 0:
                partition = known[event.topic, event.key] = self._partitioner(event.key, of_topic, of_topic)
            lanes[self._settings.topic(event.topic), partition].append(event)
        return lanes

    async def _partitions(self, topic: str) -> list[int]:
        if self._missing.get(topic, 0) > time.monotonic():
            return []
        try:
            return sorted(await self._producer.partitions_for(self._settings.topic(topic)))
        except KafkaError as error:
            logger.warning("topic %s: %s: %s; trying again", topic, type(error).__name__, error)
            self._missing[topic] = time.monotonic() + _MISSING_TOPIC_SECONDS
            return []

    async def _send(self, lane: Lane, waiting: deque[OutboxEvent], done: Round, end: float) -> None:
        """Batch after batch, each when the one before is acked. A refused batch is sent again message by message."""
        blocked: set[bytes | None] = set()
        alone = 0
        while waiting and time.monotonic() < end:
            batch = self._producer.create_batch()
            taken: list[OutboxEvent] = []
            while waiting and not (alone and taken):
                event = waiting[0]
                if event.key in blocked and event.key is not None:
                    waiting.popleft()
                    continue
                headers = self._headers(event)
                if batch.append(timestamp=None, key=event.key, value=event.value, headers=headers) is None:
                    break
                taken.append(waiting.popleft())
            if not taken:
                return
            batch.close()
            try:
                sent = await (await self._producer.send_batch(batch, lane[0], partition=lane[1]))
            except _UNPUBLISHABLE as error:
                if len(taken) > 1:
                    waiting.extendleft(reversed(taken))
                    alone = len(taken)
                    continue
                done.refused.append((taken[0], f"{type(error).__name__}: {len(taken[0].value or b'')} bytes"))
                blocked.add(taken[0].key)
            else:
                done.acked += taken
                self.marks.reached(*lane, sent.offset + len(taken))
            alone = max(0, alone - 1)

    def _headers(self, event: OutboxEvent) -> list[tuple[str, bytes]]:
        headers = [(name, value.encode()) for name, value in event.headers.items()]
        headers.append(("event_id", str(event.id).encode()))
        if number := event.headers.get("job_id") or event.headers.get("seq"):
            headers += self._traces.headers(int(number)).items()
        return headers


class Relay:
    """Leads or stands by until `stopping`; nothing is lost whichever way it ends."""

    def __init__(
        self,
        settings: Settings,
        stopping: Callable[[], bool],
        silent_seconds: float = _SILENT_SECONDS,
        traces: Traces | None = None,
    ) -> None:
        self._settings = settings
        self._stopping = stopping
        self._silent_seconds = silent_seconds
        self._traces = traces or Traces()
        self._work = asyncio.Event()
        self._retry_at = 0.0

    async def run(self) -> None:
        """Relay until stopping; reconnects by itself."""
        while not self._stopping():
            try:
                async with outbox.leadership(self._settings.dsn, self._stopping, self._silent_seconds) as connection:
                    if connection is not None:
                        await self._lead(connection)
            except Exception as error:
                if not (is_transient(error) or isinstance(error, KafkaError | Superseded | TopicError)):
                    raise
                logger.warning("relay: %s: %s; retrying", type(error).__name__, error)
            await asyncio.sleep(0 if self._stopping() else _RETRY_SECONDS)

    async def _lead(self, connection: Connection) -> None:
        publisher = Publisher(self._settings, self._traces)
        try:
            await publisher.start()
            await publisher.marks.lead(connection)
            await connection.add_listener(outbox.CHANNEL, self._hear)
            logger.info("relay leads")
            while not self._stopping():
                self._work.clear()
                if time.monotonic() >= self._retry_at:
                    await self._retry_held(publisher, connection)
                async with asyncio.timeout(self._silent_seconds):  # whatever does not answer, Postgres or Kafka
                    busy = await self._round(publisher, connection)
                if not busy and not await self._is_woken():
                    await publisher.marks.end()
        finally:
            with contextlib.suppress(KafkaError, Superseded, TimeoutError):
                async with asyncio.timeout(_LAST_MARK_SECONDS):
                    await publisher.marks.end()
            await publisher.stop()

    def _hear(self, connection: object, pid: int, channel: str, payload: object) -> None:
        if payload == outbox.RETRY:
            self._retry_at = 0.0
        self._work.set()

    async def _is_woken(self) -> bool:
        """Wait for work a while; whether there is said to be some."""
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                return await self._work.wait()
        except TimeoutError:
            return False

    async def _round(self, publisher: Publisher, connection: Connection) -> bool:
        """Publish the oldest that waits and remove what is acked; whether anything came of it."""
        window = await outbox.read(connection, _ROWS, _BYTES)
        metrics.EPOCH_MISMATCH.inc(window.outdated)
        done = await publisher.publish(connection, window.events)
        await outbox.acknowledge(connection, done.acked)
        for event, reason in done.refused:
            with logs.about(event_id=event.id, **event.headers):
                logger.error("event %d cannot be published (%s); its key is held back", event.id, reason)
            await outbox.hold(connection, event, reason)
        metrics.OUTBOX_PUBLISHED.inc(len(done.acked))
        return bool(done.acked or done.refused or window.outdated)

    async def _retry_held(self, publisher: Publisher, connection: Connection) -> None:
        """Try each key that is held back from its first row on; one that goes through is held no longer."""
        self._retry_at = time.monotonic() + _RETRY_HELD_SECONDS
        after = 0
        while page := await outbox.held_keys(connection, after):
            for held in page:
                await self._retry_key(publisher, connection, held)
            after = page[-1][2]

    async def _retry_key(
        self, publisher: Publisher, connection: Connection, held: tuple[str, bytes | None, int]
    ) -> None:
        while events := (await outbox.read_held(connection, held, _ROWS, _BYTES)).events:
            done = await publisher.publish(connection, events)
            await outbox.acknowledge(connection, done.acked)
            metrics.OUTBOX_PUBLISHED.inc(len(done.acked))
            if len(done.acked) < len(events):
                for event, reason in done.refused:
                    await outbox.hold(connection, event, reason)
                break
