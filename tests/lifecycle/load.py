"""A load that flows while workers come and go, and what is looked at meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from tests.chaos.load import Sent, make
from tests.topology import Topology
from tidemark.oracle.fold import fold_inputs

_PER_TOPIC = 20_000
_SHARE, _PAUSE_SECONDS = 30, 0.1
_LOOK_SECONDS = 0.1

# How far each role has got, and whether something waits for it. Records arrive all the time; the `triggers` role is on
# the way of what waits for a reset.
_PROGRESS = """
select 'intake' as role, coalesce(sum(next_offset), 0) as done, true as waiting from kafka_offsets
    where consumer_group like '%intake'
union all
select 'resets', count(*) filter (where reset_at is not null), bool_or(reset_at is null) from corrections
union all
select 'books', count(*) filter (where right_at is not null), bool_or(reset_at is not null and right_at is null)
    from corrections
"""


async def all_ready(stack: Stack) -> bool:
    """Whether every worker of the stack serves."""
    return all(worker.ready for worker in stack.workers.values())


@dataclass
class Flow:
    """gaps: the longest standstill of each role so far while something waited for it, in seconds; sent: all records."""

    gaps: dict[str, float] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    _moved: dict[str, tuple[int, float]] = field(default_factory=dict)

    def look(self, rows: Sequence[asyncpg.Record]) -> None:
        """At how far each role has got."""
        now = time.monotonic()
        for role, done, waiting in rows:
            before, since = self._moved.get(role, (-1, now))
            if done != before or not waiting:
                self._moved[role] = done, now
            self.gaps[role] = max(self.gaps.get(role, 0.0), now - since)


@asynccontextmanager
async def flowing(topology: Topology, seed: int) -> AsyncIterator[Flow]:
    """Records of all kinds, late and bad ones among them, as long as the block runs."""
    flow, over = Flow(), asyncio.Event()
    sending = asyncio.create_task(_send(topology, flow, seed, over))
    looking = asyncio.create_task(_look(topology, flow))
    try:
        yield flow
    finally:
        over.set()
        looking.cancel()
        await sending


async def _send(topology: Topology, flow: Flow, seed: int, over: asyncio.Event) -> None:
    remaining = iter(make(seed, _PER_TOPIC).records)
    async with AIOKafkaProducer(
        bootstrap_servers=topology.settings.bootstrap_servers,
        acks="all",
        enable_idempotence=True,  # it outlasts a broker that is away for a while, and sends nothing twice
        request_timeout_ms=120_000,
    ) as producer:
        while not over.is_set():
            share = [record for _, record in zip(range(_SHARE), remaining, strict=False)]
            assert share, "the load was too small"
            acks = [await producer.send(topology.settings.topic(s.topic), s.value, key=s.key) for s in share]
            await asyncio.gather(*acks)
            flow.sent += share
            topology.count_sent(len(share))
            await asyncio.sleep(_PAUSE_SECONDS)


async def _look(topology: Topology, flow: Flow) -> None:
    while True:
        flow.look(await topology.pool.fetch(_PROGRESS))
        await asyncio.sleep(_LOOK_SECONDS)


async def books_are_right(topology: Topology, flow: Flow) -> None:
    """The books are what a recomputation of the tables gives, and of what was sent."""
    await topology.settle()
    result = await topology.audit()
    assert result.agrees, result.differences[:10]
    assert not result.waiting
    wanted = fold_inputs((each.topic, each.value) for each in flow.sent if not each.bad).books("FIFO")
    assert result.snapshots == wanted.snapshot_count > 0
    assert await topology.pool.fetchval("select count(*) from corrections") > 0
