"""What a stack keeps for days, kept for minutes: so that an hour shows whether it grows."""

from __future__ import annotations

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from streams.kafka_clients import client_settings
from streams.settings import Settings
from streams.topics import all_topics

MINUTES = 4
KEEP_DAYS = MINUTES / (24 * 60)
HEAP = "-Xms160m -Xmx160m"
"""A Java heap is looked through when it is full: one of 512 MiB fills for longer than an hour."""

_AGE = str(MINUTES * 60_000)
_SEGMENTS = {"segment.ms": _AGE, "segment.bytes": str(8 * 1024 * 1024)}
_DELETED = {"retention.ms": _AGE, **_SEGMENTS}
_COMPACTED = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.1", "delete.retention.ms": _AGE, **_SEGMENTS}
_OFFSETS = "__consumer_offsets"


async def keep_minutes(settings: Settings) -> None:
    """Let every topic forget, or compact, what is older than MINUTES."""
    wanted = {
        topic.name: topic.config | (_COMPACTED if topic.compacted else _DELETED) for topic in all_topics(settings)
    }
    wanted[_OFFSETS] = _COMPACTED
    admin = AIOKafkaAdminClient(**client_settings(settings))
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, c) for name, c in wanted.items()])
    finally:
        await admin.close()
