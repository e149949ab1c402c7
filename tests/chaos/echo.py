"""Writes job records again: the job topic is delivered at least once, and a security has one job at a time, so this is
how the watermark sink gets as many records as the other sinks."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from confluent_kafka import Consumer, Message, Producer

from tests.chaos.sender import PATIENT, Partition

_COPIES = 30  # of a record that has just been written; the rest when everything is over, the oldest jobs first
_ECHO = ("echo", b"")


class Echo:
    """A consumer and a producer in a thread of their own; `finish` makes it complete the total and end."""

    def __init__(self, bootstrap: str, topic: str, total: int) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._total = total
        self._heard: list[Message] = []
        self._sent = self._acked = 0
        self._finishing, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.ends: Counter[Partition] = Counter()
        """The offset after the last record known to be in the topic, by partition."""

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def finish(self) -> None:
        """Nothing new will be written by others."""
        self._finishing.set()

    @property
    def done(self) -> bool:
        """Whether the topic has the total."""
        return self._finishing.is_set() and len(self._heard) + self._acked >= self._total

    def stop(self) -> None:
        """Give up what is not written."""
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        producer = Producer(PATIENT | {"bootstrap.servers": self._bootstrap})
        consumer = Consumer(
            {"bootstrap.servers": self._bootstrap, "group.id": "echo", "auto.offset.reset": "earliest",
             "enable.auto.commit": False, "reconnect.backoff.max.ms": 1_000, "log_level": 0}
        )  # fmt: skip
        consumer.subscribe([self._topic])
        try:
            while not (self._over.is_set() or self.done):
                for message in consumer.consume(100, 0.1):
                    if message.error() is None:
                        self._hear(producer, message)
                if self._finishing.is_set():
                    self._complete(producer)
                producer.poll(0)
        finally:
            consumer.close()
            producer.purge()

    def _hear(self, producer: Producer, message: Message) -> None:
        self._note(message)
        if message.value() is None or _ECHO in (message.headers() or []):
            return
        self._heard.append(message)
        for _ in range(min(_COPIES, self._total - self._sent - len(self._heard))):
            self._write(producer, message)

    def _complete(self, producer: Producer) -> None:
        for number in range(self._total - self._sent - len(self._heard) if self._heard else 0):
            self._write(producer, self._heard[number % len(self._heard)])

    def _write(self, producer: Producer, message: Message) -> None:
        while True:
            try:
                producer.produce(
                    self._topic, message.value(), message.key(), message.partition(), self._written, headers=[_ECHO]
                )
                break
            except BufferError:
                producer.poll(0.1)
        self._sent += 1

    def _written(self, error: Any, message: Message) -> None:
        if error is not None:
            self._sent -= 1
            return
        self._acked += 1
        self._note(message)

    def _note(self, message: Message) -> None:
        place = (message.topic(), message.partition())
        self.ends[place] = max(self.ends[place], message.offset() + 1)
