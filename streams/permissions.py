"""What each role may do in Kafka: the least it needs, as a list that the documents, the command and the check share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from streams import topics
from streams.lag import OWNED_BY_POSTGRES, topics_by_group
from streams.settings import ROLES, Settings

Operation = Literal["Read", "Write", "Create", "Describe", "DescribeConfigs"]


class Permission(NamedTuple):
    """An operation on a topic or consumer group, in Kafka's own terms; Read and Write include Describe."""

    resource: Literal["topic", "group"]
    name: str
    operation: Operation


_READS: dict[str, list[str]] = {
    "triggers": [topics.DEAD_LETTERS],  # the console shows them
    "books": [topics.PROCESSED, topics.VALUATIONS],  # after a loss it looks up what consumers have seen
}
_WRITES: dict[str, list[str]] = {
    "triggers": [topics.JOBS],
    "books": [  # the relay; dead letters go back to the inputs through it
        *(topics.BUSINESS_DATES, topics.PRICES, topics.TRANSACTIONS, topics.TRIGGERS, topics.STATUS),
        *(topics.PROCESSED, topics.VALUATIONS, topics.DEAD_LETTERS),
    ],
}


def needed(settings: Settings, role: str) -> list[Permission]:
    """The least that a worker of the role needs.

    Any worker may be the one that reports the lag of all groups, so each reads what any of them reads (true time lag is
    the time of the record at the position), and asks for the offsets that Kafka holds.
    """
    groups = topics_by_group(settings)
    observed = sorted({topic for read in groups.values() for topic in read})
    asked = [settings.group(other) for other in ROLES if other != role and other not in OWNED_BY_POSTGRES]
    found = [
        Permission("group", settings.group(role), "Read"),
        *(Permission("group", group, "Describe") for group in asked),
        *(Permission("topic", topic, "Read") for topic in observed),
        *(Permission("topic", settings.topic(topic), "Read") for topic in _READS.get(role, [])),
        *(Permission("topic", settings.topic(topic), "Write") for topic in _WRITES.get(role, [])),
        # Any worker may be the one that confirms the database.
        Permission("topic", settings.topic(topics.GENERATION), "Read"),
        Permission("topic", settings.topic(topics.GENERATION), "Write"),
    ]
    if role == "triggers":
        table = topics.changelog(settings)
        found += [Permission("topic", table, "Read"), Permission("topic", table, "Write")]
    return [*found, *(Permission("topic", name, "DescribeConfigs") for name in relied_on(settings, role))]


def relied_on(settings: Settings, role: str) -> list[str]:
    """The compacted topics that the role works from: were they not, what it needs would be removed."""
    of_role = {
        "triggers": [settings.topic(topics.JOBS), topics.changelog(settings)],
        "resets": [settings.topic(topics.JOBS)],
    }
    return [*of_role.get(role, []), settings.topic(topics.GENERATION)]


def needed_to_create(settings: Settings) -> list[Permission]:
    """For `tidemark topics`."""
    names = [topic.name for topic in topics.all_topics(settings)]
    operations: tuple[Operation, ...] = ("Create", "Describe", "DescribeConfigs")
    return [Permission("topic", name, operation) for name in names for operation in operations]
