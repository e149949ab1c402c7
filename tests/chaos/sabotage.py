"""Workers with one protection taken out, to show that the chaos runs would notice: `python -m … NAME worker ROLE`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from sinks import offsets
from streams import transport
from tidemark.main import main


def no_fence() -> None:
    """The offset moves whoever has claimed the partition since."""
    fence = "and next_offset = $5 and epoch = $6"
    assert fence in offsets._SWAP
    offsets._SWAP = offsets._SWAP.replace(fence, "and ($5::bigint, $6::bigint) is not null")


def offset_first() -> None:
    """The offset commits in a transaction of its own, before the effect."""
    whole = offsets.Offsets.step

    async def step(self, batch, next_offset, effect):
        async def nothing(connection) -> None:
            return None

        if next_offset > self._held[(batch.topic, batch.partition)].next_offset:
            await whole(self, batch, next_offset, nothing)
        return await whole(self, batch, next_offset, effect)

    offsets.Offsets.step = step


def lose_fetches() -> None:
    """Not a protection removed: three fetches are lost on their way, as when they are cancelled on our side."""
    whole = transport.BatchConsumer._fetch_batches
    left = 3

    async def fetch(self, partitions, timeout, records):
        nonlocal left
        if left:
            lost = await self._thread.call_thread(self._thread.fetch, partitions, timeout, records)
            left -= any(lost.records.values())
            return {}
        return await whole(self, partitions, timeout, records)

    transport.BatchConsumer._fetch_batches = fetch


SABOTAGES: dict[str, Callable[[], None]] = {
    "no_fence": no_fence,
    "offset_first": offset_first,
    "lose_fetches": lose_fetches,
}

if __name__ == "__main__":
    SABOTAGES[sys.argv.pop(1)]()
    main()
