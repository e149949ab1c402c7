"""Every worker's watch over the gate: it has the database confirmed, and starts anew when a generation begins."""

from __future__ import annotations

import asyncio
import logging

from aiokafka.errors import KafkaError

from sinks import generation
from sinks.database import is_transient
from sinks.generation import Installation
from sinks.session import PATIENCE
from streams import metrics
from streams.app import App
from streams.confirm import Confirmation, confirm
from streams.topics import TopicError

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_SAY_SECONDS = 30.0


def watch(app: App) -> None:
    """Let the worker see to it that its database is confirmed, from its start on."""
    app.from_start(_Watch(app).run)


class _Watch:
    """What the worker has seen of the gate. A new generation makes all it holds in memory doubtful."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._stopping = app.stopping("generation")
        self._known: int | None = None
        self._say_at = 0.0

    async def run(self) -> None:
        """Until the worker stops; what passes is tried again."""
        while not self._stopping():
            try:
                await self._look()
            except Exception as error:
                if is_transient(error) or isinstance(error, KafkaError | TopicError):
                    self._say(f"the database is not confirmed: {type(error).__name__}: {error}; retrying")
                else:
                    logger.exception("the database cannot be confirmed")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self) -> None:
        here = await self._read()
        if not here.is_open:
            PATIENCE.note()  # Whoever waits at the gate waits for the database.
            found = await self._confirm()
            if found.outcome == "lost":
                self._say("the database lost commits that had been published: waiting for a `books` worker to go on")
            here = await self._read()
        if not here.is_open:
            return
        metrics.GENERATION.set(here.generation)
        if self._known is None:
            self._known = here.generation
        elif self._known != here.generation:
            self._app.fail(f"generation {here.generation} has begun: the database lost commits; starting anew")

    async def _confirm(self) -> Confirmation:
        """However long the reading of the output topics takes, this loop goes round."""
        confirming = asyncio.ensure_future(confirm(self._app.settings, reannounces=self._app.role == "books"))
        try:
            while not confirming.done() and not self._stopping():
                await asyncio.wait({confirming}, timeout=_LOOK_SECONDS)
        finally:
            if not confirming.done():
                confirming.cancel()
        return await confirming

    async def _read(self) -> Installation:
        async with (await self._app.pool()).acquire() as connection:
            return await generation.read(connection)

    def _say(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._say_at:
            self._say_at = now + _SAY_SECONDS
            logger.warning("%s", what)
