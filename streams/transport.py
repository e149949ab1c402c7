"""Batch transport: for topics whose offsets Postgres owns, one Faust event is a whole fetched chunk of a partition.

Faust's cost is per event, so a chunk per event runs near the speed of the bare client. It also makes exactly-once
simple: a chunk carries the claim it was fetched under and the offset where the one before it ended, and
`sinks.offsets` refuses what does not fit. Other topics pass through untouched.

This overrides internals of faust-streaming 0.15.3 (pinned exactly). What each override is for:

* `perform_seek`: seek to the offsets in Postgres, once, by Recovery only. The fetcher calls it too when the flow has
  stopped; two claims would interleave and leave the worker with the older epoch. The flow is stopped first: records
  delivered between seek and resume would be dropped from the queues although the read offset has passed them.
  Standby copies go back to what they hold: what they had been sent is dropped with the queues as well.
* `_getmany`: fetch batch topics separately, leaving out partitions with enough batches in flight (back-pressure).
  A jump in offsets is not believed because it is there: each fetch must begin where the one before left the client.
  A fetch that went astray (cancelled on our side, yet finished in the client's thread) is fetched once more; a hole
  that the broker itself answers (compaction, markers of transactions, aborted ones) is real unless the log no longer
  holds the offset.
  A hole with nothing behind it travels as a batch without records, once a fetch has found nothing more and all before
  it is stored: a stored offset that stayed behind would be stranded by retention.
* `_to_message`: a chunk travels as the message of the last offset that it passes.
* `_add_gap`, `_new_offset`: to Faust's acknowledgement logic a chunk looks like a hole in the offsets. What is
  committed to Kafka is what Postgres holds, whenever the event was acknowledged: a sink may read ahead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import faust
from aiokafka.errors import KafkaError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from sinks.batches import Batch
from sinks.offsets import Claim, OffsetOutsideLog, Offsets
from streams.client_thread import FETCH_SECONDS, ClientThread, Fetched, fetched_bytes
from streams.membership import Lease

logger = logging.getLogger(__name__)

_EMPTY_FETCH_SECONDS = 0.02  # how soon to look again while some partition is held back
_CLAIM_SECONDS = 80.0  # longer than a session may stand still in a transaction

_inside_fetcher: ContextVar[bool] = ContextVar("_inside_fetcher", default=False)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one batch topic: records in a batch, batches of a partition that may await their agent.

    size: bytes that its records may hold on their way, all partitions together; what exceeds it is one fetch's at most.
    """

    records: int
    in_flight: int = 2
    size: int = 32 * 1024 * 1024


class BatchSchema(faust.Schema):  # type: ignore[misc]
    """Hands the chunk to the agent as it is; the agent decodes record by record."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> None:
        """A chunk has no key."""

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        """The chunk itself."""
        return message.value


class BatchConsumer(driver.Consumer):  # type: ignore[misc]
    """Faust's consumer, with batches for `app.batch_topics` and their offsets claimed from `app.offsets`."""

    app: BatchApp

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sent: dict[TP, deque[tuple[int, int]]] = defaultdict(deque)
        """Last offset of each batch handed out, oldest first, and the bytes that it holds."""
        self._turns: dict[TP, int] = defaultdict(int)  # batches handed out: who has had fewest comes first
        self._claims: dict[TP, Claim] = {}
        self._position: dict[TP, int] = {}  # where the next batch starts
        self._left: dict[TP, int] = {}  # where the last fetch left the client
        self._on_trial: set[TP] = set()  # read by another process (streams.trials); nothing is fetched here
        self._fetching = asyncio.Lock()  # a fetch must not straddle a seek
        self.undelivered = 0
        """Records fetched, and not in an agent's queue yet: Faust hands them over one by one."""
        super().__init__(*args, **kwargs)

    def _new_consumer_thread(self) -> Any:
        return ClientThread(self, loop=self.loop, beacon=self.beacon)

    # -- claiming ------------------------------------------------------------------------------------------------

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Fetch; whatever the fetcher calls from here on knows that it is not Recovery."""
        _inside_fetcher.set(True)
        try:
            async for item in super().getmany(timeout):
                yield item
                self.undelivered -= 1
        finally:
            self.undelivered = 0

    async def perform_seek(self) -> None:
        """Claim every assigned batch partition and seek to the offset that Postgres holds."""
        if _inside_fetcher.get():
            return
        self.stop_flow()
        async with self._fetching:
            for partition in self._batch_partitions(self._sent.keys() | self._claims.keys()):
                books = (self._sent, self._claims, self._position, self._left)
                for book in (*books, self._acked, self._acked_index):
                    book.pop(partition, None)
            await super().perform_seek()
            if standbys := self._standbys():
                await self._thread.seek_wait(standbys)

    def _standbys(self) -> dict[TP, int]:
        """Where the copies of others' tables end. What they have been sent since is still in a queue, to be cleared."""
        recovery = self.app.tables.recovery
        return {tp: recovery.standby_offsets[tp] + 1 for tp in recovery.standby_tps & self.assignment()}

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Kafka's committed offsets for ordinary topics, Postgres' for batch topics."""
        offsets = dict(await super().seek_to_committed())
        mine = self._batch_partitions(self.assignment())
        if not mine:
            return offsets
        try:
            async with asyncio.timeout(_CLAIM_SECONDS):
                claims = await self._claim(mine)
        except TimeoutError:
            self.app.fail("Postgres did not answer the claim of the partitions")
            raise
        wanted = {partition: claim.next_offset for partition, claim in claims.items()}
        await self._thread.seek_wait(wanted)
        self._claims.update(claims)
        self._position.update(wanted)
        self._left.update(wanted)
        self._on_trial = self.app.trials.begin(claims)
        return {**offsets, **wanted}

    async def _claim(self, partitions: set[TP]) -> dict[TP, Claim]:
        starts = await self._thread.earliest_offsets(*partitions)
        ends = await self._thread.highwaters(*partitions)
        claimed = await self.app.offsets.claim(
            {(tp.topic, tp.partition): starts[tp] for tp in partitions},
            {(tp.topic, tp.partition): ends[tp] for tp in partitions},
        )
        claims = {TP(*partition): claim for partition, claim in claimed.items()}
        await self._check_log({tp: claim.next_offset for tp, claim in claims.items()})
        return claims

    async def go_on(self, tp: TP, claim: Claim) -> None:
        """Read a partition again whose trial is over, from where the trial has brought it."""
        async with self._fetching:
            mine = self._claims.get(tp)
            if tp in self._on_trial and mine is not None and mine.epoch == claim.epoch:
                await self._thread.seek_wait({tp: claim.next_offset})
                self._position[tp] = self._left[tp] = claim.next_offset
                self._on_trial.discard(tp)

    async def wait_empty(self) -> None:
        """Wait until all events that agents have taken are acknowledged."""
        for let_go in self.app.before_wait_empty:
            await let_go()
        await super().wait_empty()
        await self.app.offsets.hand_over()

    def _batch_partitions(self, partitions: Iterable[TP]) -> set[TP]:
        return {tp for tp in partitions if tp.topic in self.app.batch_topics}

    def still_polling(self) -> None:
        """It reads with another client; a member that is not seen to poll for broker_max_poll_interval leaves."""
        self._thread._ensure_consumer()._subscription._last_fetch_ended = time.monotonic()

    # -- fetching ------------------------------------------------------------------------------------------------

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Any]]:
        active = set(active_partitions or ())  # a snapshot: Faust changes the live set during the await
        async with self._fetching:
            found = await self._fetch_all(active, min(timeout, FETCH_SECONDS)) if self.flow_active else {}
        self.undelivered = sum(map(len, found.values()))
        return found

    async def _fetch_all(self, active: set[TP], timeout: float) -> dict[TP, list[Any]]:
        others = active - self._batch_partitions(active)
        batched = active - others - self._on_trial
        ready = {tp for tp in batched & self._claims.keys() if self._in_flight(tp) < self._limits(tp).in_flight}
        room = self._room()
        ready = {tp for tp in ready if room[tp.topic] > 0}
        if len(ready) < len(batched):
            timeout = min(timeout, _EMPTY_FETCH_SECONDS)
        found: dict[TP, list[Any]] = {}
        if ready:
            found = await self._fetch_batches(ready, 0 if others else timeout)
        if others:  # never fetch from an empty set: aiokafka reads it as "all partitions"
            found |= await self._fetch(others, 0 if found else timeout, self.app.conf.broker_max_poll_records)
        elif not ready:
            await self.sleep(timeout)
        return {tp: [self._batch(tp, found[tp])] if tp in batched else found[tp] for tp in found}

    async def _fetch(self, partitions: set[TP], timeout: float, records: int) -> dict[TP, list[Any]]:
        thread = self._thread
        fetched: dict[TP, list[Any]] = await thread.call_thread(
            thread._fetch_records, thread._ensure_consumer(), partitions, timeout=timeout, max_records=records
        )
        return dict(fetched)

    async def _fetch_batches(self, partitions: set[TP], timeout: float) -> dict[TP, list[Any]]:
        """Records of each partition, going on where the last fetch ended; what went astray comes once more."""
        thread = self._thread
        most = {tp: self._limits(tp).records for tp in sorted(partitions, key=lambda tp: self._turns[tp])}
        fetched: Fetched = await thread.call_thread(thread.fetch, most, timeout, self._room())
        astray = {tp for tp, begun in fetched.begun.items() if begun != self._left[tp]}
        holes = {tp for tp in fetched.begun.keys() - astray if self._jumps(tp, fetched)}
        try:
            if astray or holes:
                await self._check_log({tp: self._left[tp] for tp in astray | holes})
            if astray:
                logger.warning("a fetch of %s went astray; fetching again", sorted(f"{t}[{p}]" for t, p in astray))
                await thread.seek_wait({tp: self._left[tp] for tp in astray})
        except KafkaError as error:  # what was fetched counts as astray, next time
            logger.warning("a jump in offsets cannot be looked into: %s: %s", type(error).__name__, error)
            return {}
        found = {}
        for tp in fetched.begun.keys() - astray:
            ended = fetched.ended.get(tp)
            if ended is not None:
                self._left[tp] = ended
            if (rows := fetched.records.get(tp)) or self._is_behind_hole(tp, fetched):
                found[tp] = rows or []
        return found

    def _is_behind_hole(self, tp: TP, fetched: Fetched) -> bool:
        """Whether the client has passed offsets without records, this fetch has found nothing behind them, and all
        before them is stored."""
        position = self._position[tp]
        held = self.app.offsets.held((tp.topic, tp.partition))
        is_still = fetched.begun[tp] == fetched.ended.get(tp) == self._left[tp]
        return is_still and self._left[tp] > position and held is not None and held.next_offset == position

    def _jumps(self, tp: TP, fetched: Fetched) -> bool:
        rows = fetched.records.get(tp)
        first = rows[0].offset if rows else fetched.ended.get(tp)
        return first is not None and first != self._left[tp]

    async def _check_log(self, offsets: Mapping[TP, int]) -> None:
        """Stop the worker when the log does not hold where a partition must go on."""
        starts = await self._thread.earliest_offsets(*offsets)
        ends = await self._thread.highwaters(*offsets)
        for tp, offset in sorted(offsets.items()):
            try:
                self.app.offsets.check((tp.topic, tp.partition), offset, starts[tp], ends[tp])
            except OffsetOutsideLog as error:
                self.app.fail(str(error))
                raise

    def _batch(self, tp: TP, records: list[Any]) -> Batch:
        """The chunk that ends where the fetch has left the client."""
        end = max(self._left[tp], records[-1].offset + 1 if records else 0)
        batch = Batch(tp.topic, tp.partition, self._claims[tp].epoch, self._position[tp], records, end)
        self._position[tp] = batch.next_offset
        self._sent[tp].append((batch.next_offset - 1, sum(map(fetched_bytes, records))))
        self._turns[tp] = 1 + max(self._turns[tp], min(self._turns[other] for other in self._claims))
        return batch

    def _limits(self, tp: TP) -> BatchLimits:
        return self.app.batch_topics[tp.topic]

    def _to_message(self, tp: TP, record: Any) -> Any:
        if not isinstance(record, Batch):
            return super()._to_message(tp, record)
        return ConsumerMessage(
            tp.topic, tp.partition, record.next_offset - 1, time.time(), 0, None, None, record, None,
            tp=tp, generation_id=self.app.consumer_generation_id,
        )  # fmt: skip

    # -- Kafka's committed offset follows, as a courtesy to lag monitors -----------------------------------------

    def _in_flight(self, tp: TP) -> int:
        sent, acked = self._sent[tp], self._acked_index[tp]
        while sent and sent[0][0] in acked:  # only ever over a contiguous prefix
            acked.discard(sent.popleft()[0])
        return len(sent)

    def _room(self) -> dict[str, int]:
        """Bytes that each topic's records may still take, beside those on their way to its agent or in its hands."""
        room = {topic: limits.size for topic, limits in self.app.batch_topics.items()}
        for tp, sent in self._sent.items():
            room[tp.topic] -= sum(size for _, size in sent)
        return room

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        if tp.topic not in self.app.batch_topics:
            await super()._add_gap(tp, offset_from, offset_to)

    def _new_offset(self, tp: TP) -> int | None:
        if tp.topic not in self.app.batch_topics:
            offset: int | None = super()._new_offset(tp)
            return offset
        self._in_flight(tp)
        self._acked[tp].clear()
        held = self.app.offsets.held((tp.topic, tp.partition))
        return held.next_offset if held else None


class _BatchTransport(driver.Transport):  # type: ignore[misc]
    Consumer = BatchConsumer


class Trials(Protocol):
    """Who reads partitions at which workers have died; `streams.trials` is it."""

    def begin(self, claims: Mapping[TP, Claim]) -> set[TP]:
        """Start the trials that are due; returns their partitions."""

    def end(self) -> None:
        """End all trials at once. May be called from another thread."""


class BatchApp(faust.App):  # type: ignore[misc]
    """A Faust app with batch topics. `offsets` owns their positions; `fail` ends the process with a reason."""

    offsets: Offsets
    lease: Lease
    trials: Trials

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batch_topics: dict[str, BatchLimits] = {}
        self.before_wait_empty: list[Callable[[], Awaitable[None]]] = []
        """Whoever keeps events unacknowledged between two of them is told here to let them go."""
        super().__init__(*args, **kwargs)

    def on_rebalance_start(self) -> None:
        """The rebalance waits for every batch in hand: let them end at once, the next owner goes on where they are."""
        self.offsets.release()
        self.trials.end()
        super().on_rebalance_start()

    def _new_transport(self) -> Any:
        return _BatchTransport(self.conf.broker_consumer, self)

    def batch_topic(self, name: str, limits: BatchLimits) -> Any:
        """A topic that reaches its agent as `sinks.batches.Batch` values."""
        self.batch_topics[name] = limits
        return self.topic(name, schema=BatchSchema())

    def fail(self, reason: str) -> None:
        """Stop the worker at once, acknowledging nothing more. A supervisor starts it again."""
        try:
            logging.getLogger("tidemark").critical("worker stops: %s", reason)
            logging.shutdown()
            sys.stderr.flush()
        finally:  # even where the disk that holds the log is full
            os._exit(1)
