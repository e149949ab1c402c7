"""Clients of a worker close their TLS connections at once, also while a fetch is under way."""

from __future__ import annotations

import asyncio
import time

from aiokafka import AIOKafkaConsumer, TopicPartition

from streams import event_loop, topics
from streams.kafka_clients import client_settings
from streams.settings import Settings
from tests.security.conftest import SecureKafka
from tests.security.test_acls import prefix as prefix


async def test_a_client_that_waits_for_records_closes_at_once(secure: SecureKafka, prefix: str) -> None:
    settings = secure.settings("admin", sasl_username="admin", topic_prefix=prefix)
    took = await asyncio.to_thread(in_a_loop_of_a_worker, settings)
    assert took < 25  # uvloop by itself: 30 s


def in_a_loop_of_a_worker(settings: Settings) -> float:
    """Seconds that closing takes."""
    before = asyncio.get_event_loop_policy()
    event_loop.install()
    try:
        return asyncio.run(read_and_close(settings))
    finally:
        asyncio.set_event_loop_policy(before)


async def read_and_close(settings: Settings) -> float:
    """Closes while the broker holds a fetch back, since there is nothing to answer."""
    place = TopicPartition(settings.topic(topics.PRICES), 0)
    consumer = AIOKafkaConsumer(**client_settings(settings), fetch_max_wait_ms=60_000, request_timeout_ms=90_000)
    await consumer.start()
    consumer.assign([place])
    await consumer.seek_to_end(place)
    await consumer.getmany(place, timeout_ms=500)
    started = time.monotonic()
    await consumer.stop()
    return time.monotonic() - started
