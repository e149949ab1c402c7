"""The thread in which Kafka's consumer lives: how `streams.transport` fetches batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from sinks.batches import bytes_of

FETCH_SECONDS = 0.2
"""How long the broker may wait for records. A claim waits for the fetch before it, and its own requests do as well."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One fetch. begun, ended: where the client stood on each partition before and after; None: nowhere."""

    begun: Mapping[TP, int | None]
    records: Mapping[TP, list[Any]]
    ended: Mapping[TP, int | None]


class ClientThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """Faust's thread around aiokafka's consumer, which reads committed records, partition by partition."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # Faust offers it only together with its own transactions
        consumer._fetch_max_wait_ms = int(FETCH_SECONDS * 1000)  # Faust: 1500
        self.app.lease.follow(consumer)
        return consumer

    async def fetch(self, most: Mapping[TP, int], timeout: float, room: Mapping[str, int]) -> Fetched:
        """At most so many records of each partition, in that order; waits only when no partition has any.

        room: bytes for each topic; where they are used up its other partitions wait for their turn. To be called in
        this thread: nobody else moves the client meanwhile. Each partition is asked for its share: the client would
        give all that is asked for from the first partition that has enough of it.
        """
        consumer, partitions = self._ensure_consumer(), set(most)
        begun = self._positions(consumer, partitions)
        records: dict[TP, list[Any]] = {}
        left = dict(room)
        for tp, limit in most.items():
            if left[tp.topic] > 0:
                found = await self._fetch_records(consumer, {tp}, timeout=0, max_records=limit)
                left[tp.topic] -= sum(map(fetched_bytes, found.get(tp, ())))
                records |= found
        if not records:
            limit = min(most.values())
            records |= await self._fetch_records(consumer, partitions, timeout=timeout, max_records=limit)
        return Fetched(begun, records, self._positions(consumer, partitions))

    @staticmethod
    def _positions(consumer: Any, partitions: set[TP]) -> dict[TP, int | None]:
        subscription = consumer._subscription.subscription
        assignment = subscription.assignment if subscription else None
        if assignment is None:
            return dict.fromkeys(partitions)
        states = {tp: assignment.state_value(tp) for tp in partitions if tp in assignment.tps}
        return {tp: state.position if state.has_valid_position else None for tp, state in states.items()}


def fetched_bytes(record: Any) -> int:
    """What a record holds of memory, headers and all."""
    return bytes_of(record) + sum(len(name) + len(value or b"") for name, value in record.headers)
