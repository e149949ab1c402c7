"""Sends a load in shares, each let loose just before a fault, so that every fault meets a backlog."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from confluent_kafka import Producer

from tests.chaos.load import Sent
from tests.chaos.witness import Place

Partition = tuple[str, int]

PATIENT = {
    "enable.idempotence": True,
    "linger.ms": 20,
    "message.timeout.ms": 600_000,
    "reconnect.backoff.max.ms": 1_000,
    "log_level": 0,
}
"""Settings of a producer that outlasts every fault."""


class Sender:
    """A producer in a thread of its own; release() says how far it may go."""

    def __init__(self, bootstrap: str, records: list[Sent]) -> None:
        self._records = records
        self._allowed = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bootstrap,), daemon=True)
        self.ends: Counter[Partition] = Counter()
        """The offset after the last record that the broker has acknowledged, by partition."""
        self.bad: list[Place] = []
        """Where the bad records went."""
        self.failed: list[str] = []
        self._acked = 0

    def start(self) -> None:
        """Connect; nothing is sent yet."""
        self._thread.start()

    def release(self, share: float) -> None:
        """Let it send up to this share of the load, 0 to 1."""
        self._allowed = max(self._allowed, int(share * len(self._records)))

    @property
    def done(self) -> bool:
        """Whether the whole load is in Kafka."""
        return self._acked == len(self._records)

    def stop(self) -> None:
        """Give up what is not sent."""
        self._over.set()
        self._thread.join(30)

    def _run(self, bootstrap: str) -> None:
        producer = Producer(PATIENT | {"bootstrap.servers": bootstrap})
        sent = 0
        while not (self._over.is_set() or (self.done and sent == len(self._records))):
            if sent < self._allowed:
                record = self._records[sent]
                try:
                    producer.produce(record.topic, record.value, record.key, on_delivery=self._noting(record))
                    sent += 1
                except BufferError:
                    producer.poll(0.1)
                producer.poll(0)
            else:
                producer.poll(0.05)
                time.sleep(0.01)
        producer.purge()

    def _noting(self, record: Sent) -> Any:
        def note(error: Any, message: Any) -> None:
            if error is not None:
                self.failed.append(str(error))
                return
            self._acked += 1
            place = (message.topic(), message.partition())
            self.ends[place] = max(self.ends[place], message.offset() + 1)
            if record.bad:
                self.bad.append((*place, message.offset()))

        return note
