"""A run of events whose records, table writes and acknowledgements are made together, in that order, at its end.

Faust writes a table's value, and a record of its changelog, at each assignment, and acknowledges an event when the
agent asks for the next. A run ends when no more events have been fetched, so an idle worker does both at once; in a
burst many events of one key cost one write, and the broker's answers to what was published are awaited together. No
event is acknowledged before the writes that follow from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

_MOST = 500
"""Events of a run. Bounds what is done again after a crash, and how long a group's change waits for the run's end."""


class WriteBehind:
    """Around one table and the stream of one agent."""

    def __init__(self, app: Any, table: Any, stream: Any) -> None:
        self._app = app
        self._table = table
        self._stream = stream.noack()
        self._waiting = self._stream.channel.queue
        self._begin()
        self._turn = asyncio.Lock()
        app.before_wait_empty.append(self.end)
        app.on_partitions_assigned.connect(self.forget)

    def _begin(self) -> None:
        self._events: list[Any] = []
        self._published: list[Awaitable[Any]] = []
        self._writes: dict[bytes, tuple[Any, bytes | None]] = {}
        """By key: the event that it follows from, and the value (None: none)."""

    async def events(self) -> AsyncIterator[Any]:
        """The stream's events. Asking for the next one says that this one's effects are all given to this object."""
        async for event in self._stream.events():
            async with self._turn:
                self._events.append(event)
                yield event
                if len(self._events) >= _MOST or not await self._more():
                    await self._end()

    async def end(self) -> None:
        """End the run now: a rebalance or a stop waits for it, and has dropped the events that would have ended it."""
        async with self._turn:
            await asyncio.create_task(self._end())  # the table asks the context which event is the current one

    async def _more(self) -> bool:
        """Whether an event waits, or is about to. Never waits for one that has not been fetched, or will be dropped."""
        consumer = self._app.consumer
        while self._waiting.empty() and consumer.undelivered and consumer.flow_active:  # noqa: ASYNC110
            await asyncio.sleep(0)  # the fetcher's turn: it needs a few for each event
        return not self._waiting.empty()

    def get(self, key: bytes) -> bytes | None:
        """The value as the events of this run have left it."""
        return self._writes[key][1] if key in self._writes else self._table.get(key)

    def set(self, event: Any, value: bytes | None) -> None:
        """The value of the event's key from now on; None removes it."""
        self._writes[event.key] = event, value

    def published(self, answer: Awaitable[Any]) -> None:
        """The broker's answer to a record that must be there before the table is written."""
        self._published.append(answer)

    async def forget(self, *_: Any, **__: Any) -> None:
        """Partitions were assigned anew: whoever owns them now gets what was not acknowledged again."""
        self._begin()

    async def _end(self) -> None:
        await asyncio.gather(*self._published)
        for key, (event, value) in self._writes.items():
            self._stream._set_current_event(event)  # a table's partition is that of the stream's current event
            if value is not None:
                self._table[key] = value
            elif self._table.get(key) is not None:
                del self._table[key]
        if self._events:
            self._stream._set_current_event(self._events[-1])  # Faust goes on from there
        for event in self._events:
            if event.ack():
                self._app.sensors.on_message_out(event.message.tp, event.message.offset, event.message)
        self._begin()
