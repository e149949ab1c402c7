"""uvloop, which must not wait for the other side to say good-bye.

Closing a TLS connection, uvloop waits for the peer's own end of it, 30 s by default; a broker that still has a fetch
to answer says nothing until then. Every stop of a client would take that long, and a worker's stop longer than it is
given.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop

_GOOD_BYE_SECONDS = 0.5


class _Loop(uvloop.Loop):
    async def create_connection(self, *args: Any, ssl: Any = None, **options: Any) -> Any:
        """As uvloop's, with a shorter wait when a TLS connection is closed."""
        if ssl:
            options.setdefault("ssl_shutdown_timeout", _GOOD_BYE_SECONDS)
        return await super().create_connection(*args, ssl=ssl, **options)


class _Policy(uvloop.EventLoopPolicy):  # type: ignore[misc]
    def _loop_factory(self) -> uvloop.Loop:
        return _Loop()


def install() -> None:
    """For every event loop of this process, those of Faust's threads too."""
    asyncio.set_event_loop_policy(_Policy())
