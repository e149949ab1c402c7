"""Reading a topic from its beginning to its present end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from streams.settings import Settings


async def read_all(settings: Settings, *topics: str) -> tuple[list[Any], dict[TopicPartition, int]]:
    """(records in order per partition, end of each partition) of topics named as in `streams.topics`.

    Partitions are assigned and `earliest` is where a consumer begins of itself: with a subscription and a seek, the
    reset to the latest offset that the subscription began may arrive after the seek, and nothing is read.
    """
    places = await _partitions(settings, topics)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers, auto_offset_reset="earliest", fetch_max_wait_ms=100
    )
    await consumer.start()
    try:
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        found: list[Any] = []
        while any([await consumer.position(place) < end for place, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += records
        return found, ends
    finally:
        await consumer.stop()


async def _partitions(settings: Settings, topics: Sequence[str]) -> list[TopicPartition]:
    """Asked for: what a consumer knows of topics that it has not subscribed to comes and goes."""
    names = {settings.topic(topic) for topic in topics}
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        described = await admin.describe_topics(list(names))
    finally:
        await admin.close()
    places = [TopicPartition(topic["topic"], p["partition"]) for topic in described for p in topic["partitions"]]
    assert {place.topic for place in places} == names
    return places
