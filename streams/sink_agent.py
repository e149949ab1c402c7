"""The agent side of an exactly-once sink: decode, apply, bury what is refused, report. One place for all sinks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from sinks import outbox
from sinks.batches import Batch, Record
from sinks.chunks import ChunkSize
from sinks.database import Connection
from sinks.model import DeadLetter
from sinks.offsets import Fenced, Overburdened, Released, Stopping
from streams import logs, metrics
from streams.app import App
from streams.records import Rejected

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 2
"""Transactions of one sink. While Postgres works on one, this process prepares the other; a third would only wait."""
_FIRST_PIECE = 100  # records of the first transaction: what kills the worker may be among them
_LARGEST_PIECE = 16 * 1024 * 1024  # bytes of the records in one transaction, unless it is one record
_PORTION = 250  # records decoded at a stretch: a millisecond or two


@dataclass(frozen=True, slots=True)
class Applied:
    """What one transaction did: records ignored, records refused by offset, and whether the outbox got anything.

    corrections: the sequence numbers of those that it issued, by security.
    """

    ignored: int = 0
    conflicts: Mapping[int, str] = field(default_factory=dict)
    epochs_bumped: int = 0
    corrections: Mapping[str, int] = field(default_factory=dict)
    outbox: bool = True


@dataclass(frozen=True)
class _Decoded(Generic[T]):
    """A batch by offset: what could be decoded, and letters for the rest."""

    good: dict[int, T] = field(default_factory=dict)
    letters: dict[int, DeadLetter] = field(default_factory=dict)


class Sink(Generic[T]):
    """decode: bytes to a record, raising Rejected; apply: the effect of (offset, record) pairs."""

    def __init__(
        self,
        app: App,
        topic: str,
        decode: Callable[[bytes | None], T],
        apply: Callable[[Connection, Sequence[tuple[int, T]]], Awaitable[Applied]],
    ) -> None:
        self._app = app
        self._topic = topic
        self._decode = decode
        self._apply = apply
        largest = app.settings.batch_records
        self._size = ChunkSize(min(_FIRST_PIECE, largest), largest, app.settings.batch_target_ms / 1000)
        metrics.expect(topic)

    async def consume(self, batches: AsyncIterable[Batch]) -> None:
        """Commit batch after batch of each partition; meanwhile decode the next, and commit one of another partition.

        So Faust believes a batch done while its transaction may still run. That harms nothing: where the next owner
        goes on is decided by that transaction, and what Kafka is told follows Postgres.
        """
        running: dict[int, asyncio.Task[None]] = {}
        try:
            async for batch in batches:
                decoding = asyncio.create_task(self._decode_all(batch))
                before = running.get(batch.partition)
                await asyncio.wait({decoding, before} if before else {decoding})
                while len(running := {p: task for p, task in running.items() if not task.done()}) >= _AT_ONCE:
                    await asyncio.wait(running.values(), return_when=asyncio.FIRST_COMPLETED)
                running[batch.partition] = asyncio.create_task(self._commit(batch, decoding))
        finally:
            if running:
                await asyncio.wait(running.values())

    async def _decode_all(self, batch: Batch) -> _Decoded[T]:
        """In small portions: between two statements Postgres waits for this very event loop."""
        decoded = _Decoded[T]()
        for number, record in enumerate(batch.records, 1):
            try:
                decoded.good[record.offset] = self._decode(record.value)
            except Rejected as error:
                decoded.letters[record.offset] = self._letter(record, error.reason, error.detail)
            if number % _PORTION == 0:
                await asyncio.sleep(0)
        return decoded

    async def _commit(self, batch: Batch, decoding: Awaitable[_Decoded[T]]) -> None:
        """Commit one batch, or drop it when fenced. Nothing else leaves: a bug ends the process."""
        try:
            decoded = await decoding
            rest: Batch | None = batch
            while rest is not None:
                piece, after = rest.split(self._size.count, _LARGEST_PIECE)
                if await self._commit_piece(piece, decoded):
                    rest = after
        except Released:
            logger.info("%s[%d]: given up at %d for a rebalance", batch.topic, batch.partition, batch.start)
        except Fenced:
            metrics.FENCED.labels(self._topic).inc()
            logger.warning("%s[%d]: fenced at %d; batch dropped", batch.topic, batch.partition, batch.start)
            self._app.fenced(batch)
        except Stopping:
            pass
        except Exception as error:
            logger.exception("%s[%d] from offset %d", batch.topic, batch.partition, batch.start)
            self._app.fail(f"{type(error).__name__}: {error}")

    async def _commit_piece(self, piece: Batch, decoded: _Decoded[T]) -> bool:
        """One transaction; how long it takes decides how many records the next has.

        False: it was too much for one transaction, and is to be tried again in smaller pieces.
        """
        started, began = time.time(), time.perf_counter()
        try:
            with self._app.pulse.at_work(f"{piece.topic}[{piece.partition}]"):
                outcomes = await self._app.offsets.apply(piece, partial(self._effect, decoded), self._refuse)
        except Overburdened as error:
            if len(piece) == 1:
                raise
            logger.warning("%s[%d]: %s; %d records were too many", self._topic, piece.partition, error, len(piece))
            self._size = self._size.halved(len(piece))
            self._report(error.done, started)
            return False
        seconds = time.perf_counter() - began
        metrics.BATCH_SECONDS.labels(self._topic).observe(seconds)
        self._size = self._size.after(len(piece), seconds)
        metrics.BATCHES.labels(self._topic).inc()
        metrics.RECORDS.labels(self._topic).inc(len(piece))
        self._report(outcomes, started)
        return True

    # -- in trial (streams.trial) --------------------------------------------------------------------------------

    async def attempt(self, batch: Batch, alive: Callable[[], None]) -> None:
        """Apply a batch of one record. What goes wrong is raised."""
        await self._commit_piece(batch, await self._decode_all(batch))

    async def vouch(self, batch: Batch) -> bool:
        """Apply a batch and take it back; whether it has a record that is good."""
        decoded = await self._decode_all(batch)
        if not decoded.good:
            return False
        await self._app.offsets.rehearse(batch, lambda c: self._effect(decoded, c, batch.records))
        return True

    async def condemn(self, connection: Connection, record: Record, detail: str) -> None:
        """Bury a record that no worker survives, as received."""
        await outbox.bury(connection, [self._letter(record, "poison", detail)])

    async def _effect(
        self, decoded: _Decoded[T], connection: Connection, records: Sequence[Record]
    ) -> tuple[Applied, list[DeadLetter]]:
        good = [(r.offset, decoded.good[r.offset]) for r in records if r.offset in decoded.good]
        letters = [decoded.letters[r.offset] for r in records if r.offset in decoded.letters]
        applied = await self._apply(connection, good) if good else Applied(outbox=False)
        if applied.conflicts:
            letters += [
                self._letter(record, "conflicting_duplicate", applied.conflicts[record.offset])
                for record in records
                if record.offset in applied.conflicts
            ]
        await outbox.bury(connection, letters)
        return applied, letters

    async def _refuse(self, connection: Connection, record: Record, detail: str) -> None:
        logger.error("%s: Postgres refused the record at offset %d: %s", self._topic, record.offset, detail)
        await outbox.bury(connection, [self._letter(record, "invalid", detail)])
        metrics.DEAD_LETTERS.labels(self._topic, "invalid").inc()

    def _letter(self, record: Any, reason: Any, detail: str) -> DeadLetter:
        return DeadLetter(record.topic, record.partition, record.offset, record.key, record.value, reason, detail)

    def _report(self, outcomes: Sequence[tuple[Applied, list[DeadLetter]]], started: float) -> None:
        for applied, letters in outcomes:
            metrics.IGNORED.labels(self._topic).inc(applied.ignored)
            metrics.EPOCH_BUMPED.inc(applied.epochs_bumped)
            for security_id, seq in applied.corrections.items():
                with logs.about(seq=seq, security_id=security_id):
                    logger.info("correction %d: late records of %s", seq, self._topic)
                self._app.traces.done("issue", seq, started, security_id=security_id, topic=self._topic)
            for letter in letters:
                metrics.DEAD_LETTERS.labels(self._topic, letter.reason).inc()
            if applied.outbox or letters:
                self._app.outbox_written()
