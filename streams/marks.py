"""What the relay says before it publishes: that a round begins, durably in Postgres and then in Kafka."""

from __future__ import annotations

import logging
import time

from aiokafka import AIOKafkaProducer
from msgspec.structs import replace

from sinks import generation
from sinks.database import Connection
from sinks.generation import Mark
from streams import topics, witness
from streams.log_reader import open_log
from streams.published import OUTPUTS
from streams.settings import Settings
from streams.witness import Superseded

logger = logging.getLogger(__name__)

_POSITIONS_SECONDS = 5.0  # How old the positions may be that a round stores.


class Marks:
    """One leadership's marks. Each must follow the one before it, else another relay is alive."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer) -> None:
        self._settings = settings
        self._producer = producer
        self._outputs = {settings.topic(name) for name in OUTPUTS}
        self._positions: dict[str, int] = {}
        self._stored_at = 0.0
        self._next_offset = 0
        self._open: Mark | None = None

    async def lead(self, connection: Connection) -> None:
        """Look at what was published before. Raises Superseded when it was not by this database."""
        async with open_log(self._settings, [self._settings.topic(topics.GENERATION), *sorted(self._outputs)]) as log:
            tail = await witness.tail_of(self._settings, log)
            ends = {
                f"{each.topic}/{each.partition}": end for each, end in log.ends.items() if each.topic in self._outputs
            }
        here = await generation.read(connection)  # after the marks, which each follow on their round
        if here.is_open and tail.supersedes(here):
            raise Superseded(
                "another database has been confirmed since this one was: this one publishes nothing. Where it is the "
                "one to go on with, end the other one and restart this server"
            )
        if here.is_open and tail.is_ahead_of(here):
            await generation.close_gate(connection)
            raise Superseded("this database has gone back behind what it had published: it is to be confirmed anew")
        self._next_offset = tail.end
        # Before a first round all that is there is of rounds that the database knows.
        self._positions = {each: min(here.positions.get(each, end), end) for each, end in ends.items()}

    async def begin(self, connection: Connection) -> None:
        """To be called between reading a round's messages and publishing the first of them.

        Raises Superseded, and the gate's error while the database is not confirmed.
        """
        is_due = time.monotonic() - self._stored_at > _POSITIONS_SECONDS
        mark = await generation.begin_round(connection, self._positions if is_due else None)
        if is_due:
            self._stored_at = time.monotonic()
        self._open = mark
        self._follow(await witness.send_mark(self._producer, self._settings, mark))

    async def end(self) -> None:
        """Nothing of the last round is on its way any more: whoever confirms another database need not wait for it."""
        if self._open:
            mark, self._open = self._open, None
            self._follow(await witness.send_mark(self._producer, self._settings, replace(mark, done=True)))

    def reached(self, topic: str, partition: int, next_offset: int) -> None:
        """The broker has acknowledged a partition up to there."""
        if topic in self._outputs:
            self._positions[f"{topic}/{partition}"] = next_offset

    def _follow(self, offset: int) -> None:
        if offset != self._next_offset:
            raise Superseded(f"another relay has written at {self._next_offset}, before {offset}")
        self._next_offset = offset + 1
