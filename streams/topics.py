"""The topics: names, and the settings they are created with. Nothing relies on auto-creation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from streams.kafka_clients import client_settings
from streams.settings import Settings

BUSINESS_DATES = "business-dates"
PRICES = "prices"
TRANSACTIONS = "transactions"
TRIGGERS = "reprocessing-triggers"
JOBS = "reprocessing-jobs"
STATUS = "reprocessing-status"
PROCESSED = "transactions-processed"
VALUATIONS = "position-valuations"
DEAD_LETTERS = "dead-letters"
GENERATION = "tidemark-generation"
TABLE = "triggers"

logger = logging.getLogger(__name__)

CLEANUP, COMPACT = "cleanup.policy", "compact"

_DAY = 24 * 3600 * 1000
_LARGEST = str(2 * 1024 * 1024)  # a record over 1 MiB must come in to be refused with a reason
_WAIT_SECONDS = 30.0


class TopicError(Exception):
    """A topic is missing or is not as it must be; one line says which and what to do."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it is created.

    fixed_partitions: another partition count would break the trigger table. in_order: its records belong in one order.
    """

    name: str
    partitions: int
    config: dict[str, str] = field(default_factory=dict)
    fixed_partitions: bool = False
    in_order: bool = False

    @property
    def compacted(self) -> bool:
        """Whether it keeps the last record of each key for good."""
        return self.config[CLEANUP] == COMPACT


def changelog(settings: Settings) -> str:
    """The changelog of the trigger table, as Faust names it."""
    return f"{settings.group('triggers')}-{TABLE}-changelog"


def all_topics(settings: Settings) -> list[Topic]:
    """Every topic Tidemark reads or writes."""
    keep = {CLEANUP: "delete", "retention.ms": str(30 * _DAY), "max.message.bytes": _LARGEST}
    compact = {
        CLEANUP: COMPACT,
        "delete.retention.ms": str(7 * _DAY),
        "min.insync.replicas": "2" if settings.replication_factor > 2 else "1",
    }
    inputs = [
        Topic(BUSINESS_DATES, 1, keep, in_order=True),
        *(Topic(name, settings.input_partitions, keep) for name in (PRICES, TRANSACTIONS)),
    ]
    internal = [
        Topic(settings_name, settings.internal_partitions, config, fixed_partitions=True)
        for settings_name, config in ((TRIGGERS, keep), (STATUS, keep), (JOBS, compact))
    ]
    witness = Topic(GENERATION, 1, compact, fixed_partitions=True)
    outputs = [Topic(name, settings.internal_partitions, keep) for name in (PROCESSED, VALUATIONS, DEAD_LETTERS)]
    named = [replace(topic, name=settings.topic(topic.name)) for topic in [*inputs, *internal, *outputs, witness]]
    return [*named, Topic(changelog(settings), settings.internal_partitions, compact, fixed_partitions=True)]


async def ensure_topics(settings: Settings) -> dict[str, str]:
    """Create what is missing and check the rest; returns "created" or "exists" by topic name.

    Raises TopicError when an internal topic has another partition count or the job topic is not compacted, or the
    broker does not answer.
    """
    wanted = {topic.name: topic for topic in all_topics(settings)}
    admin = AIOKafkaAdminClient(**client_settings(settings), request_timeout_ms=20_000)
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            await admin.start()
            created = await _create(admin, wanted, settings.replication_factor)
            found = await _describe(admin, set(wanted))
            cleanup = await _policies(admin, [topic.name for topic in wanted.values() if topic.compacted])
            check(settings, {name: len(topic["partitions"]) for name, topic in found.items()}, cleanup)
    except (KafkaError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise TopicError(f"cannot reach the broker at {settings.bootstrap_servers}: {reason}") from error
    finally:
        await admin.close()
    return {name: "created" if name in created else "exists" for name in wanted}


async def _create(admin: AIOKafkaAdminClient, wanted: dict[str, Topic], replication: int) -> set[str]:
    existing = set(await admin.list_topics())
    missing = [topic for name, topic in wanted.items() if name not in existing]
    if not missing:
        return set()
    response = await admin.create_topics(
        [NewTopic(t.name, t.partitions, replication, topic_configs=t.config) for t in missing]
    )
    created = set()
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        if code == 0:
            created.add(name)
        elif error is not TopicAlreadyExistsError:
            raise TopicError(f"topic {name}: {rest[0] if rest and rest[0] else error.__name__}")
    return created


async def _describe(admin: AIOKafkaAdminClient, names: set[str]) -> dict[str, Any]:
    """The topics by name, once the brokers know them all: creation is acknowledged before it is known everywhere."""
    while True:
        found = {t["topic"]: t for t in await admin.describe_topics(sorted(names)) if t["error_code"] == 0}
        if found.keys() == names and all(p["leader"] >= 0 for t in found.values() for p in t["partitions"]):
            return found
        await asyncio.sleep(0.1)


async def _policies(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, str]:
    asked = [ConfigResource(ConfigResourceType.TOPIC, name, {CLEANUP: None}) for name in names]
    (answer,) = await admin.describe_configs(asked)
    return policies(answer)


def policies(answer: Any) -> dict[str, str]:
    """The cleanup policies, by topic, in the answer to a DescribeConfigs that asks for nothing else."""
    return {name: entries[0][1] for _, _, _, name, entries in answer.resources if entries}


def check(settings: Settings, partitions: Mapping[str, int], policies: Mapping[str, str]) -> None:
    """Compare topics that are there, by name, with how they must be. Raises TopicError, one line for the first.

    What works, but not as well as it could, is logged.
    """
    for topic in all_topics(settings):
        found = partitions.get(topic.name, topic.partitions)
        if topic.in_order and found > 1:
            logger.warning(
                "topic %s has %d partitions, so its records may be read in another order than they were sent, and a "
                "date read late corrects every security: send them all with one key, as `tidemark produce` does",
                topic.name,
                found,
            )
        if topic.fixed_partitions and found != topic.partitions:
            raise TopicError(f"topic {topic.name} has {found} partitions, but {_must_have(settings, topic)}")
        policy = policies.get(topic.name, COMPACT)
        if topic.compacted and policy != COMPACT:
            raise TopicError(
                f"topic {topic.name} has cleanup.policy={policy}, which removes what is still needed: set "
                f"cleanup.policy={COMPACT}"
            )


def _must_have(settings: Settings, topic: Topic) -> str:
    if topic.name == settings.topic(GENERATION):
        return "must have one, since its order decides: create it anew"
    return (
        f"TIDEMARK_INTERNAL_PARTITIONS is {topic.partitions}: all internal topics must have that many; change the "
        "setting or create the topic anew"
    )
