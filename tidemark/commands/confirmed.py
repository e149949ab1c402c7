"""Commands that write wait for nothing: where the gate is closed they have the database confirmed, or say who must."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from aiokafka.errors import KafkaError

from sinks.database import DatabaseError
from sinks.generation import is_closed_gate
from streams.confirm import confirm
from streams.settings import Settings
from streams.topics import TopicError

T = TypeVar("T")


@contextmanager
def reading_what_was_published(settings: Settings) -> Iterator[None]:
    """Kafka's errors become a TopicError, one line that names the broker."""
    try:
        yield
    except KafkaError as error:
        raise TopicError(f"cannot read what was published at {settings.bootstrap_servers}: {error}") from error


async def once_confirmed(settings: Settings, work: Callable[[], Awaitable[T]]) -> T:
    """The work's result. It must be safe to begin again: the gate refuses its first write, and nothing is done then.

    Raises DatabaseError while a `books` worker must see to what was lost, TopicError when Kafka does not answer.
    """
    try:
        return await work()
    except Exception as error:
        if not is_closed_gate(error):
            raise
    with reading_what_was_published(settings):
        found = await confirm(settings, reannounces=False)
    if found.outcome == "lost":
        raise DatabaseError(
            "the database has lost commits that were published: a `books` worker must announce anew what consumers "
            "have seen; `tidemark after-restore` says what"
        )
    if found.outcome == "busy":
        raise DatabaseError("a worker is confirming the database after its start: try again in a moment")
    return await work()
