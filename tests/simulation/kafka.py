"""A model of Kafka: partitioned logs with stable offsets, compaction with tombstones, and groups whose members may not
know yet that they lost a partition.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Any, NamedTuple
from zlib import crc32


class Record(NamedTuple):
    """One record of a partition."""

    offset: int
    key: bytes | None
    value: Any


class Log:
    """One partition. Offsets only grow; compaction leaves holes."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.end = 0

    def append(self, key: bytes | None, value: Any) -> int:
        """Add a record; returns its offset."""
        self.records.append(Record(self.end, key, value))
        self.end += 1
        return self.end - 1

    def read(self, offset: int, limit: int) -> list[Record]:
        """Up to so many records from the offset on."""
        first = bisect_left(self.records, offset, key=lambda record: record.offset)
        return self.records[first : first + limit]

    def compact(self, before: int) -> None:
        """Of the records before an offset only the last per key stays, of the whole log; no offset changes."""
        latest = {record.key: record.offset for record in self.records}
        self.records = [r for r in self.records if r.offset >= before or latest[r.key] == r.offset]


class Broker:
    """Logs by (topic, partition); keys go where their hash says; committed offsets by group."""

    def __init__(self, partitions: dict[str, int]) -> None:
        self.partitions = partitions
        self.logs: dict[tuple[str, int], Log] = {
            (topic, number): Log() for topic, count in partitions.items() for number in range(count)
        }
        self.committed: dict[tuple[str, str, int], int] = defaultdict(int)

    def send(self, topic: str, key: bytes, value: Any) -> None:
        """Publish and have it acknowledged."""
        self.logs[topic, crc32(key) % self.partitions[topic]].append(key, value)

    def contents(self, topic: str) -> list[Record]:
        """Every record of a topic, partition after partition."""
        return [record for (name, _), log in sorted(self.logs.items()) if name == topic for record in log.records]
