"""Sending as fast as one producer can, until the broker has it all."""

from __future__ import annotations

from collections.abc import Iterable

from confluent_kafka import Producer

from streams.settings import Settings


def send(settings: Settings, topic: str, records: Iterable[tuple[str, bytes]]) -> None:
    """Keys and values to the topic named as in `streams.topics`; partitions by the key, each key's in this order.

    Idempotent: else what a topic that is new refuses at first is sent again behind what came after it.
    """
    producer = Producer(
        {
            "bootstrap.servers": settings.bootstrap_servers,
            "linger.ms": 20,
            "batch.size": 500_000,
            "enable.idempotence": True,
        }
    )
    name = settings.topic(topic)
    for key, value in records:
        while True:
            try:
                producer.produce(name, value, key=key.encode())
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
