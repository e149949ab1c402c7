"""A bare loop around aiokafka's getmany, with what helps any such process: uvloop, fewer searches for cycles."""

from __future__ import annotations

import asyncio

import uvloop
from aiokafka import AIOKafkaConsumer

from streams import garbage
from tests.bench.peers.fold import Clock, State, config, fold


async def main() -> None:
    """Read and fold."""
    wanted, state, clock = config(), State(), Clock(config()["records"])
    consumer = AIOKafkaConsumer(
        wanted["topic"],
        bootstrap_servers=wanted["bootstrap"],
        group_id=wanted["group"],
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    await consumer.start()
    while True:
        found = await consumer.getmany(timeout_ms=200, max_records=5_000)
        if found:
            clock.begin()
        for records in found.values():
            for record in records:
                fold(state, record.value)
            clock.done(len(records), state)


garbage.look_less_often()
uvloop.install()
asyncio.run(main())
