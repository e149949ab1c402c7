"""How every Kafka consumer of ours takes what it has fetched: in bounded memory, and whatever the bytes are.

aiokafka inflates a batch of records whole (306 kB may be 600 MiB), and raises what it cannot read, again at each try.
Here a batch is inflated piece by piece, and what cannot be read, or is too large, is a record with the value `Refused`
at its place in the log. So the position moves on, and readers refuse it as they refuse other bad input.

`install` puts this in place of parts of aiokafka (pinned exactly). What each part is for:

* `_RecordBatches` splits a fetched piece of the log into batches and leaves their bytes to be looked at.
* `_Records` reads them (`streams/record_batches.py`).
* `_Fetched` bounds a chunk in bytes, and lets others have their turn while a batch is long in inflating.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.legacy_records import LegacyRecordBatch

from streams.codecs import Corrupt, inflate
from streams.record_batches import BREATH, CODEC, HEADER_BYTES, MOST_HEADERS, Record, read
from streams.records import LARGEST_RECORD, Refused

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1024 * 1024
"""Of keys and values that are handed over at once: what a fetch brings where nothing is compressed."""
_RECORD_BYTES = 100  # what a record, or a header, counts beside its contents
_TRIES = 3  # of a batch whose checksum is wrong: it may have been damaged on its way

_OVERHEAD = struct.calcsize(">qi")
_MAGIC = struct.calcsize(">qii")
_LARGEST_LEGACY = 16 * 1024 * 1024


class _RecordBatches:
    """In place of aiokafka's MemoryRecords: whole batches, as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data or b"")
        self._place = 0

    def size_in_bytes(self) -> int:
        return len(self._data)

    def has_next(self) -> bool:
        """Whether a whole batch is left; the last one of a fetch may be cut."""
        return self._end() <= len(self._data)

    def next_batch(self) -> memoryview:
        start, self._place = self._place, self._end()
        return self._data[start : self._place]

    def _end(self) -> int:
        head = self._data[self._place : self._place + _OVERHEAD]
        if len(head) < _OVERHEAD:
            return len(self._data) + 1
        return self._place + _OVERHEAD + max(0, int.from_bytes(head[8:], "big", signed=True))


class _Records(fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of one fetch of a partition, those of aborted transactions left out."""

    next_fetch_offset: int

    def _unpack_records(self) -> Iterator[Any]:
        while self._records.has_next():
            raw = self._records.next_batch()
            if len(raw) < HEADER_BYTES or raw[_MAGIC] != 2:
                yield from self._legacy(raw)
                continue
            batch = DefaultRecordBatch(bytes(raw))
            if not batch.validate_crc():
                if _again(self._tp, batch.base_offset):
                    return  # the position stays, so that the batch is fetched once more
                yield from self._refused(raw, batch.next_offset - 1, "the record batch has a wrong checksum")
            elif self._is_wanted(batch):
                yield from self._readable(raw, batch)
            self.next_fetch_offset = max(self.next_fetch_offset, batch.next_offset)

    def _is_wanted(self, batch: Any) -> bool:
        """Neither a marker nor of an aborted transaction; as aiokafka decides it."""
        if self._isolation_level == fetcher.READ_COMMITTED:
            self._consume_aborted_up_to(batch.base_offset)
            if batch.is_control_batch and self._is_abort(batch):
                self._aborted_producers.discard(batch.producer_id)
            if batch.is_transactional and batch.producer_id in self._aborted_producers:
                return False
        return not batch.is_control_batch

    def _is_abort(self, batch: Any) -> bool:
        try:
            return bool(self._contains_abort_marker(batch))
        except Exception as error:
            logger.error("%s: an unreadable marker at %d: %s", self._tp, batch.base_offset, error)
            return False

    def _readable(self, raw: memoryview, batch: Any) -> Iterator[Any]:
        last = batch.next_offset - 1
        try:
            for record in read(raw):
                if record is BREATH:
                    yield record
                elif record.offset > last:
                    raise Corrupt("a record lies beyond the end of its batch")
                elif record.offset >= self.next_fetch_offset:  # the fetch may begin in the middle of a batch
                    yield self._handed_over(record)
        except Corrupt as error:
            yield from self._refused(raw, last, str(error))

    def _legacy(self, raw: memoryview) -> Iterator[Any]:
        """Of the formats before Kafka 0.11. What is compressed is read only if it is not too large."""
        try:
            base = int.from_bytes(raw[:8], "big", signed=True)
            magic = raw[_MAGIC]
            if magic > 1:
                raise Corrupt(f"unknown record format {magic}")
            _check_legacy(raw, magic)
            batch = LegacyRecordBatch(bytes(raw), magic)
            if not batch.validate_crc():
                raise Corrupt("the message has a wrong checksum")
            for record in batch:
                if record.offset >= self.next_fetch_offset:
                    yield self._handed_over(record)
            self.next_fetch_offset = max(self.next_fetch_offset, batch.next_offset)
        except Exception as error:
            yield from self._refused(raw, max(base, self.next_fetch_offset), str(error) or type(error).__name__)

    def _handed_over(self, record: Any) -> Any:
        self.next_fetch_offset = record.offset + 1
        return self._consumer_record(self._tp, record)

    def _refused(self, raw: memoryview, last: int, detail: str) -> Iterator[Any]:
        """What is left of a batch, as one record at its last offset."""
        if last < self.next_fetch_offset:
            return
        logger.error("%s: offsets %d to %d cannot be read: %s", self._tp, self.next_fetch_offset, last, detail)
        detail = f"offsets {self.next_fetch_offset} to {last} cannot be read: {detail}"
        value = Refused(raw[: LARGEST_RECORD + 1], "malformed", detail)
        yield self._handed_over(Record(last, -1, 0, None, value, []))

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        found = super()._consumer_record(tp, record)
        many = len(found.headers) > MOST_HEADERS
        return replace(found, headers=found.headers[:MOST_HEADERS]) if many else found


class _Fetched(fetcher.FetchResult):  # type: ignore[misc]
    """One fetch of a partition, handed over in chunks."""

    _partition_records: Any

    def getall(self, max_records: int | None = None) -> list[Any]:
        """The next chunk. It may be empty although more is to come: `has_more` tells."""
        if not self.check_assignment(self._topic_partition) or not self.has_more():
            return []
        found: list[Any] = []
        size = 0
        for record in self._partition_records:
            if record is BREATH:
                break
            found.append(record)
            size += len(record.key or b"") + len(record.value or b"") + _RECORD_BYTES * (1 + len(record.headers))
            if size >= CHUNK_BYTES or len(found) == max_records:
                break
        else:
            self._update_position()
            self._partition_records = None
            return found
        self._update_position()
        return found

    def getone(self) -> Any:
        """The next record; None where there is none."""
        if not self.check_assignment(self._topic_partition) or not self.has_more():
            return None
        record = next((record for record in self._partition_records if record is not BREATH), None)
        self._update_position()
        if record is None:
            self._partition_records = None
        return record


def install() -> None:
    """Have every AIOKafkaConsumer of this process, Faust's own included, read as this module says."""
    fetcher.MemoryRecords = _RecordBatches
    fetcher.PartitionRecords = _Records
    fetcher.FetchResult = _Fetched


def _check_legacy(raw: memoryview, magic: int) -> None:
    """Raises Corrupt for a compressed message that inflates to too much: aiokafka would inflate it whole."""
    place = _MAGIC + 1
    codec, place = raw[place] & CODEC, place + 1 + 8 * magic
    if not codec:
        return
    key = int.from_bytes(raw[place : place + 4], "big", signed=True)
    contents = raw[place + 8 + max(0, key) :]
    inflated = 0
    for piece in inflate(codec, contents):
        inflated += len(piece)
        if inflated > _LARGEST_LEGACY:
            raise Corrupt(f"it inflates to more than {_LARGEST_LEGACY} bytes")


_doubtful: dict[Any, tuple[int, int]] = {}


def _again(partition: Any, offset: int) -> bool:
    """Whether a batch with a wrong checksum is to be fetched again."""
    before, tries = _doubtful.get(partition, (offset, 1))
    tries = tries + 1 if before == offset else 2
    _doubtful[partition] = offset, tries
    return tries <= _TRIES
