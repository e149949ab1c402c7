"""What Faust's table recovery lacks: the changelog read in chunks, and local state that the changelog does not know.

Faust replays a changelog event by event. Here whole fetched chunks go into the store at once, of each key the last
value only; Faust then finds nothing left, or the little that could not be read.

Local state ahead of its changelog is thrown away: the changelog, and behind it Postgres, rules. Faust ends such a
worker with a ConsistencyError at every start, and overlooks a changelog that holds one record only.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.types import TP
from mode import Service

from streams.kafka_clients import client_settings

logger = logging.getLogger(__name__)

_FETCH_BYTES = 4 * 1024 * 1024
_SAY_SECONDS = 3.0  # how often a long restore says how far it is


@dataclass(frozen=True, slots=True)
class _Message:
    tp: TP
    partition: int
    offset: int
    key: bytes
    value: bytes | None


@dataclass(frozen=True, slots=True)
class _Event:
    """As much of a Faust event as a store looks at."""

    message: _Message


class _Recovery(Recovery):  # type: ignore[misc]
    @Service.task
    async def _restart_recovery(self) -> None:
        """Faust's. A cancellation that comes from below ends it without a word, and the worker would never be ready."""
        with suppress(asyncio.CancelledError):
            await Recovery._restart_recovery.fun(self)
        if not self.should_stop:
            self.app.fail("the recovery of the table has ended before its time; the next start goes on where it was")

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        """Without Faust's time limits: it takes a step whose time is up for a worker that stops, and ends for good.

        What a step asks of the broker or of Postgres has limits of its own, which raise.
        """
        await super()._wait(coro)

    async def _build_offsets(self, consumer: Any, tps: set[TP], destination: Counter[TP], title: str) -> None:
        """Called for active, then standby partitions; the highwaters of the active ones are known by then."""
        await super()._build_offsets(consumer, tps, destination, title)
        if title == "active":
            self._check(tps, destination, self.active_highwaters)

    async def _build_highwaters(self, consumer: Any, tps: set[TP], destination: Counter[TP], title: str) -> None:
        """Of the standby partitions, called after everything else."""
        await super()._build_highwaters(consumer, tps, destination, title)
        if title == "standby":
            self._check(tps, self.standby_offsets, destination)

    def _check(self, tps: set[TP], offsets: Counter[TP], highwaters: Counter[TP]) -> None:
        """Stop the worker, its state thrown away, if that is ahead of the changelog."""
        ahead = sorted(tp for tp in tps if _ahead(offsets.get(tp), highwaters.get(tp)))
        if ahead:
            folder = self.app.conf.tabledir
            shutil.rmtree(folder, ignore_errors=True)
            self.app.fail(
                f"the table's state in {folder} is ahead of its changelog ({ahead[0].topic}[{ahead[0].partition}]): "
                "the topic was recreated, or has lost its end. The state is removed; the next start rebuilds it from "
                "the changelog, and the corrections ledger triggers again whatever that does not hold"
            )

    async def _seek_offsets(self, consumer: Any, tps: set[TP], offsets: Counter[TP], title: str) -> None:
        """The last step before the replay: what is read here moves the offsets on, so nothing is left to replay."""
        if self.signal_recovery_start.is_set():
            return  # partitions and offsets are those of the next rebalance already; Recovery begins anew
        if title == "active" and tps:
            ends = {tp: self.active_highwaters[tp] for tp in tps}
            missing = self.active_remaining_total()
            logger.info("changelog: %d of %d records to restore", missing, sum(ends.values()) + len(ends))
            try:
                await self._read_ahead({tp: end for tp, end in ends.items() if end > offsets[tp]}, offsets, missing)
            except KafkaError as error:
                logger.warning("changelog: %s: %s; replaying what is left", type(error).__name__, error)
        await super()._seek_offsets(consumer, tps, offsets, title)

    async def _read_ahead(self, behind: dict[TP, int], offsets: Counter[TP], missing: int) -> None:
        """Read each partition up to the offset of its last record, with a client of its own. Raises KafkaError.

        There is no time limit: whatever would come after it is slower. A rebalance or a stop cancels it.
        """
        if not behind:
            return
        started = said = time.monotonic()
        generation = self._generation_id
        reader = AIOKafkaConsumer(
            **client_settings(self.app.settings),
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=_FETCH_BYTES,
        )
        try:
            await reader.start()
            places = {TopicPartition(*tp): tp for tp in behind}
            reader.assign(list(places))
            for place, tp in places.items():
                reader.seek(place, offsets[tp] + 1)
            while behind:
                fetched = await reader.getmany(*places, timeout_ms=200)
                positions = {place: await reader.position(place) for place, tp in places.items() if tp in behind}
                if self.app.consumer_generation_id != generation:
                    return  # the stores of partitions that have gone may be closed already
                self.app.consumer.still_polling()
                for place, records in fetched.items():
                    self._apply(places[place], records)
                    offsets[places[place]] = records[-1].offset
                for place, position in positions.items():
                    if position > behind[places[place]]:
                        offsets[places[place]] = position - 1  # the last ones may be markers, or compacted away
                        del behind[places[place]]
                        reader.pause(place)
                if behind and time.monotonic() - said >= _SAY_SECONDS:
                    said, done = time.monotonic(), missing - self.active_remaining_total()
                    logger.info("changelog: %d of %d records restored", done, missing)
            logger.info("changelog: %d records restored in %.1f s", missing, time.monotonic() - started)
        finally:
            # It awaits a task that it has cancelled, which raises the cancellation here if the task has not yet begun.
            await asyncio.gather(reader.stop(), return_exceptions=True)

    def _apply(self, tp: TP, records: Sequence[Any]) -> None:
        last = {record.key: record for record in records}
        self.tp_to_table[tp].apply_changelog_batch(
            [_Event(_Message(tp, tp.partition, r.offset, key, r.value)) for key, r in last.items()]
        )


def _ahead(persisted: int | None, highwater: int | None) -> bool:
    """Both are offsets of records (-1: none)."""
    return persisted is not None and highwater is not None and persisted > highwater


class Table(faust.Table):  # type: ignore[misc]
    """Faust's, but what is no row of it is not taken from its changelog."""

    readable: Callable[[bytes | None, bytes | None], bool]

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        """Store the rows among the records."""
        super().apply_changelog_batch([e for e in batch if self.readable(e.message.key, e.message.value)])


class Tables(TableManager):  # type: ignore[misc]
    """Faust's, with our recovery."""

    _recovery: Recovery | None = None

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = _Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
