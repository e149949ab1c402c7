"""Whether this worker is for certain still a member of its group, so that what its table says may be believed.

A worker that was frozen past its session wakes up believing that it still holds its partitions, while another holds
them. The broker keeps a member for the session timeout from each heartbeat on, so a worker may trust its assignment
that long from *sending* a heartbeat that was answered without reservation, and no longer.
"""

from __future__ import annotations

import time
from typing import Any

from aiokafka.protocol.group import HeartbeatRequest, SyncGroupRequest


class Lease:
    """Follows a group coordinator's traffic. Written in the consumer's thread, read in the web server's."""

    def __init__(self, session_seconds: float) -> None:
        self._session_seconds = session_seconds
        self._until = 0.0

    @property
    def held(self) -> bool:
        """Whether no other worker can hold this worker's partitions now."""
        return time.monotonic() < self._until

    def follow(self, consumer: Any) -> None:
        """Watch the consumer's coordinator, which exists once the consumer has started."""
        start = consumer.start

        async def start_and_watch() -> None:
            await start()
            coordinator = consumer._coordinator
            send = coordinator._send_req

            async def watched(request: Any) -> Any:
                sent = time.monotonic()
                response = await send(request)
                if isinstance(request, HeartbeatRequest | SyncGroupRequest):
                    self._until = sent + self._session_seconds if response.error_code == 0 else 0.0
                return response

            coordinator._send_req = watched

        consumer.start = start_and_watch
