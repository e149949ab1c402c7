"""A fetched chunk of one partition, on its way from Kafka to a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

_OVERHEAD = 600  # bytes of a record's objects


class Record(Protocol):
    """One Kafka record, as consumers deliver it."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class Place(Protocol):
    """A partition under one claim of it."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def epoch(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """A fetched chunk of one partition. start: where the one before ended; epoch: the claim it was fetched under.

    end: where the client stood after the fetch, when that is not just after the last record. A batch may have no
    record at all: then it says that the log has none from start to end (markers of transactions, aborted records,
    what compaction removed).
    """

    topic: str
    partition: int
    epoch: int
    start: int
    records: Sequence[Record]
    end: int | None = None

    @property
    def next_offset(self) -> int:
        """The offset after the batch."""
        return self.records[-1].offset + 1 if self.end is None else self.end

    def __len__(self) -> int:
        return len(self.records)

    def split(self, count: int, size: int | None = None) -> tuple[Batch, Batch | None]:
        """The first so many records, of so many bytes unless it is one, and what is left.

        Between them no offset is missing, whatever the log lacks.
        """
        if size is not None:
            count = _fitting(self.records[:count], size)
        rest = self.records[count:]
        if not rest:
            return self, None
        first = replace(self, records=self.records[:count], end=None)
        return first, replace(self, start=first.next_offset, records=rest)


def bytes_of(record: Record) -> int:
    """What a record holds of memory, with the objects around it."""
    return len(record.value or b"") + len(record.key or b"") + _OVERHEAD


def _fitting(records: Sequence[Record], size: int) -> int:
    """How many of the first records have so many bytes together; at least one."""
    for number, record in enumerate(records):
        size -= bytes_of(record)
        if size < 0:
            return max(1, number)
    return len(records)
