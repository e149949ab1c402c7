"""Confirming a database after each start of its server: has it lost what was published, and if so, a new generation.

Kafka's log arbitrates. Whoever confirms writes a fence first, and then reads the topic up to it. So a mark before the
fence is seen, and a relay that writes one behind it does not publish.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from sinks import generation, reannounce
from sinks.database import leadership, open_connection
from sinks.generation import Installation, Mark
from streams.published import published_since
from streams.settings import Settings
from streams.witness import read_tail, set_fence

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 40.0  # As long as a relay that has lost its database may still publish what it had read.
_LOOK_SECONDS = 1.0

Outcome = Literal["open", "confirmed", "lost", "new generation", "busy"]


@dataclass(frozen=True, slots=True)
class Confirmation:
    """open: nothing was to be done; lost: a `books` worker must reannounce; busy: another worker confirms."""

    outcome: Outcome
    here: Installation | None = None
    mark: Mark | None = None


async def confirm(settings: Settings, *, reannounces: bool) -> Confirmation:
    """Open the gate, if it is closed and this caller may. Raises KafkaError, TopicError and what Postgres raises.

    reannounces: whether it may read the output topics and begin a new generation.
    """
    async with leadership(settings.dsn, generation.LOCK) as connection:
        if connection is None:
            return Confirmation("busy")
        here = await generation.read_to_confirm(connection)
        if here.is_open:
            return Confirmation("open", here)
        tail = await read_tail(settings)
        if tail.is_ahead_of(here) and not reannounces:
            return Confirmation("lost", here, tail.mark)
        fence = await set_fence(settings, here.instance, tail.mark)
        tail = await read_tail(settings, fence)
        if not tail.is_ahead_of(here):
            await generation.open_gate(connection, fence)
            logger.info("the database has lost nothing that was published: generation %d goes on", here.generation)
            return Confirmation("confirmed", here, tail.mark)
        if not reannounces:
            return Confirmation("lost", here, tail.mark)
        mark = tail.mark
        assert mark is not None
        await _last_words(settings, mark)
        published = await published_since(settings, here.positions)
        number = await reannounce.begin(connection, here, fence, mark, published)
        logger.critical(
            "the database lost commits that had been published (rounds %d to %d): generation %d begins; %d positions "
            "are announced anew, and statuses of %d jobs compared",
            here.round, mark.round, number, len(published.keys), len(published.statuses),
        )  # fmt: skip
        return Confirmation("new generation", here, mark)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a confirmation would find now. event_id, seq: the highest published; keys: to be announced anew.

    round: the last that the database knows of; published_round: the last in Kafka. jobs: with statuses since.
    """

    is_open: bool
    generation: int
    has_lost: bool
    round: int
    published_round: int
    event_id: int = 0
    seq: int = 0
    keys: int = 0
    jobs: int = 0
    reaches_back: bool = True


async def look(settings: Settings) -> Findings:
    """What the database has lost that was published; changes nothing. Raises KafkaError, TopicError, DatabaseError."""
    async with open_connection(settings.dsn) as connection:
        here = await generation.read(connection)
    tail = await read_tail(settings)
    mark = tail.mark
    if mark is None or not tail.is_ahead_of(here):
        return Findings(here.is_open, here.generation, False, here.round, mark.round if mark else 0)
    published = await published_since(settings, here.positions)
    return Findings(
        here.is_open, here.generation, True, here.round, mark.round, mark.event_id, mark.seq,
        len(published.keys), len(published.statuses), published.reaches_back,
    )  # fmt: skip


async def _last_words(settings: Settings, last: Mark) -> None:
    """Wait until the relay of before has said that it publishes nothing more, or cannot any more."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LAST_WORDS_SECONDS
    while loop.time() < until:
        mark = (await read_tail(settings)).mark
        if mark and (mark.done or mark.place > last.place):  # a later mark follows on the end of this round
            return
        await asyncio.sleep(_LOOK_SECONDS)
