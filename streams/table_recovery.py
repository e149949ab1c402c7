"""What Faust's table recovery lacks: the changelog read in chunks, and local state that the changelog does not know.

Faust replays a changelog event by event. Here whole fetched chunks go into the store at once, of each key the last
value only; Faust then finds nothing left, or the little that could not be read.

Local state ahead of its changelog is thrown away: the changelog, and behind it Postgres, rules. Faust ends such a
worker with a ConsistencyError at every start, and overlooks a changelog that holds one record only.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.types import TP

from streams.kafka_clients import client_settings

logger = logging.getLogger(__name__)

_FETCH_BYTES = 4 * 1024 * 1024
_SHARE = 0.7  # of the time that Faust gives to the step in which this is done; it replays the rest


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
    async def _build_offsets(self, consumer: Any, tps: set[TP], destination: Counter[TP], title: str) -> None:
        """Called for active, then standby partitions; the highwaters of the active ones are known by then."""
        await super()._build_offsets(consumer, tps, destination, title)
        ahead = sorted(tp for tp in tps if _ahead(destination.get(tp), self.active_highwaters.get(tp)))
        if title == "active" and ahead:
            folder = self.app.conf.tabledir
            shutil.rmtree(folder, ignore_errors=True)
            self.app.fail(
                f"the table's state in {folder} is ahead of its changelog ({ahead[0].topic}[{ahead[0].partition}]): "
                "the topic was recreated, or has lost its end. The state is removed; the next start rebuilds it from "
                "the changelog, and the corrections ledger triggers again whatever that does not hold"
            )

    async def _seek_offsets(self, consumer: Any, tps: set[TP], offsets: Counter[TP], title: str) -> None:
        """The last step before the replay: what is read here moves the offsets on, so nothing is left to replay."""
        behind = {tp: end for tp, end in self.active_highwaters.items() if tp in tps and end > offsets[tp]}
        if title == "active" and behind:
            started, missing = time.monotonic(), self.active_remaining_total()
            deadline = started + _SHARE * self.app.conf.broker_request_timeout
            try:
                await self._read_ahead(behind, offsets, deadline)
            except KafkaError as error:
                logger.warning("changelog: %s: %s; replaying what is left", type(error).__name__, error)
            done = missing - self.active_remaining_total()
            logger.info("changelog: %d records restored in %.1f s", done, time.monotonic() - started)
        await super()._seek_offsets(consumer, tps, offsets, title)

    async def _read_ahead(self, behind: dict[TP, int], offsets: Counter[TP], deadline: float) -> None:
        """Read each partition up to the offset of its last record, with a client of its own. Raises KafkaError."""
        reader = AIOKafkaConsumer(
            **client_settings(self.app.settings),
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=_FETCH_BYTES,
        )
        await reader.start()
        try:
            places = {TopicPartition(*tp): tp for tp in behind}
            reader.assign(list(places))
            for place, tp in places.items():
                reader.seek(place, offsets[tp] + 1)
            while behind and time.monotonic() < deadline:
                for place, records in (await reader.getmany(*places, timeout_ms=200)).items():
                    self._apply(places[place], records)
                    offsets[places[place]] = records[-1].offset
                for place, tp in places.items():
                    if tp in behind and (after := await reader.position(place)) > behind[tp]:
                        offsets[tp] = after - 1  # the last ones may be markers, or compacted away
                        del behind[tp]
                        reader.pause(place)
        finally:
            await reader.stop()

    def _apply(self, tp: TP, records: Sequence[Any]) -> None:
        last = {record.key: record for record in records}
        self.tp_to_table[tp].apply_changelog_batch(
            [_Event(_Message(tp, tp.partition, r.offset, key, r.value)) for key, r in last.items()]
        )


def _ahead(persisted: int | None, highwater: int | None) -> bool:
    """Both are offsets of records (-1: none)."""
    return persisted is not None and highwater is not None and persisted > highwater


class Tables(TableManager):  # type: ignore[misc]
    """Faust's, with our recovery."""

    _recovery: Recovery | None = None

    @property
    def recovery(self) -> Recovery:
        """Recovery service used by this table manager."""
        if self._recovery is None:
            self._recovery = _Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
