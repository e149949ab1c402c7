"""A TCP proxy on the loopback that slows, stops, cuts and swallows, in a thread of its own so that nothing holds it up.

It knows one thing about Postgres' protocol: what a COMMIT and its acknowledgement look like.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from deploy.local.ports import LOOPBACK

_COMMIT = b"Q\x00\x00\x00\x0cCOMMIT;\x00"
_COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"
_CHUNK = 64 * 1024
_LOOK = 0.02

Cut = Literal["before COMMIT", "after COMMIT", "silent before COMMIT", "silent after COMMIT"]
"""Where a connection ends: both ends see a reset, or, silently, nobody hears of the other again."""


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._ends = (client, server)
        self.lose_reply = False
        self.is_silent = False
        """Whether what comes from either end is swallowed, for ever, while both ends stay open."""

    def cut(self) -> None:
        """As when a cable is pulled: both ends see a reset."""
        for end in self._ends:
            end.transport.abort()


class Proxy:
    """Forwards a port of its own to target() until closed."""

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._planned: deque[Cut] = deque()
        self.port = 0
        self.delay = 0.0
        """Seconds that each chunk waits, in either direction."""
        self.stopped = False
        """Whether nothing passes, though connections stay."""
        self.cuts: Counter[Cut] = Counter()
        """Connections cut at a COMMIT so far."""
        self.is_silent = False
        """Whether every connection made from now on is silent from its beginning."""

    async def start(self, port: int = 0) -> None:
        """Listen; the port is known afterwards."""
        self._thread.start()
        self.port = await self._there(self._listen(port))

    async def close(self) -> None:
        """Cut everything and end the thread."""
        await self._there(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    def plan(self, cut: Cut) -> None:
        """The next COMMIT that passes will be cut, before the server has it or before the client hears of it."""
        self._planned.append(cut)

    @property
    def planned(self) -> int:
        """Cuts that have not found their COMMIT yet."""
        return len(self._planned)

    def cut_all(self) -> None:
        """Cut every connection there is."""
        self._loop.call_soon_threadsafe(lambda: [link.cut() for link in list(self._links)])

    async def silence_all(self) -> int:
        """From now on nothing passes on any connection there is, for ever, and nobody is told; returns how many."""
        return await self._there(self._silence())

    async def _there(self, work):
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _listen(self, port: int) -> int:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, port)
        return self._server.sockets[0].getsockname()[1]

    async def _silence(self) -> int:
        speaking = [link for link in self._links if not link.is_silent]
        for link in speaking:
            link.is_silent = True
        return len(speaking)

    async def _close(self) -> None:
        assert self._server
        self._server.close()
        for link in list(self._links):
            link.cut()
        await asyncio.sleep(2 * _LOOK)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            server_reader, server = await asyncio.open_connection(LOOPBACK, self._target())
        except OSError:
            client.transport.abort()
            return
        link = _Link(client, server)
        link.is_silent = self.is_silent
        self._links.add(link)
        try:
            await asyncio.gather(self._up(client_reader, server, link), self._down(server_reader, client, link))
        finally:
            self._links.discard(link)
            link.cut()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        async for chunk in self._chunks(reader, writer, link):
            if self._planned and _COMMIT in chunk:
                cut = self._planned.popleft()
                self.cuts[cut] += 1
                if cut == "before COMMIT":
                    link.cut()
                    return
                if cut == "silent before COMMIT":
                    link.is_silent = True
                    continue
                if cut == "silent after COMMIT":
                    link.is_silent = True  # the COMMIT itself still passes
                else:
                    link.lose_reply = True
            writer.write(chunk)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        async for chunk in self._chunks(reader, writer, link):
            if link.lose_reply and _COMMITTED in chunk:
                link.cut()
                return
            writer.write(chunk)

    async def _chunks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link):
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if self.delay:
                    await asyncio.sleep(self.delay)
                while self.stopped:  # noqa: ASYNC110 - set from another thread
                    await asyncio.sleep(_LOOK)
                if link.is_silent:
                    continue
                yield chunk
                await writer.drain()
        if link.is_silent:
            return
        with suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()
