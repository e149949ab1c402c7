"""What is said of topics that are there already."""

from __future__ import annotations

import pytest

from streams import topics
from streams.settings import Settings


def said_of_dates(partitions: int, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    settings = Settings(topic_prefix="t-")
    topics.check(settings, {settings.topic(topics.BUSINESS_DATES): partitions}, {})
    return caplog.text


def test_dates_in_several_partitions_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert "topic t-business-dates has 3 partitions" in said_of_dates(3, caplog)
    assert said_of_dates(1, caplog) == ""


def test_dates_get_one_partition_however_many_the_other_inputs_get() -> None:
    made = {topic.name: topic.partitions for topic in topics.all_topics(Settings(input_partitions=7))}
    assert (made["business-dates"], made["prices"], made["transactions"]) == (1, 7, 7)
