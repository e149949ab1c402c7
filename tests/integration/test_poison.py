"""The last line: a record that no worker survives becomes a dead letter, and whatever fails for all condemns none."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from sinks.database import connect
from streams.settings import Settings
from tests.topology import settings_for, until

_POISON = ["7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7"]


def stack_of(settings: Settings, *sabotages: str) -> Stack:
    program = [sys.executable, "-m", "tests.chaos.sabotage", ",".join(sabotages)] if sabotages else None
    return Stack(settings, roles=["intake"], **({"program": program} if program else {}))


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[asyncpg.Connection]:
    """The stack, and a connection of ours."""
    await stack.start()
    connection = await connect(stack.settings.dsn)
    try:
        yield connection
    finally:
        await connection.close()
        await stack.stop()


async def send(settings: Settings, prices: Sequence[str], partition: int = 0) -> None:
    """A price for each security, in order."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    for number, price in enumerate(prices):
        value = {"security_id": f"S{partition}-{number}-{price}", "price_date": "2025-01-02", "price": price}
        await producer.send(settings.topic("prices"), json.dumps(value).encode(), partition=partition)
    await producer.stop()


async def letters(connection: asyncpg.Connection) -> list[Any]:
    """The dead letters, which no relay takes away here."""
    return await connection.fetch(
        """
        select headers ->> 'reason' as reason, headers ->> 'detail' as detail,
               convert_from(value, 'UTF8')::json ->> 'price' as price
        from outbox_events where topic = 'dead-letters' order by event_id
        """
    )


async def reaches(connection: asyncpg.Connection, offset: int, partition: int = 0) -> None:
    """Wait until the partition's stored offset is there."""

    async def there() -> bool:
        stored = "select next_offset from kafka_offsets where topic like '%prices' and partition = $1"
        return bool(await connection.fetchval(stored, partition) == offset)

    await until(there, f"offset {offset} of partition {partition}", seconds=240)


async def test_each_poisonous_record_becomes_a_letter_and_all_others_are_applied(
    kafka: str, database: str, folder: Path
) -> None:
    settings = settings_for(kafka, database, folder, poison_attempts=2, trial_seconds=5, trial_memory_mb=768)
    prices = ["1", "1", *(price for poison in _POISON for price in (poison, "1")), "1"]
    stack = stack_of(settings, "poisonous")
    async with running(stack) as connection:
        await send(settings, prices)

        async def in_trial() -> bool:
            return bool(await connection.fetchval("select true from suspects limit 1"))

        await until(in_trial, "a trial")
        restarts = stack.restarts
        await send(settings, ["2"] * 50, partition=1)
        await reaches(connection, 50, partition=1)
        assert await connection.fetchval(
            "select next_offset from kafka_offsets where partition = 0 and topic like '%prices'"
        ) < len(prices)
        await reaches(connection, len(prices))
        found = await letters(connection)
        assert [(letter["reason"], letter["price"]) for letter in found] == [("poison", price) for price in _POISON]
        for letter, words in zip(
            found, ["a bug", "status 3", "SIGKILL", "MemoryError", "longer than 5 s", "clos", "timeout"], strict=True
        ):
            assert words in letter["detail"]
        stored = await connection.fetchval("select count(*) from market_prices")
        assert stored == 50 + len(prices) - len(_POISON)

        await send(settings, ["3"] * 5)  # the worker itself reads on
        await reaches(connection, len(prices) + 5)
        assert stack.restarts == restarts
        assert await connection.fetchval("select count(*) from suspects where condemned_at is null") == 0
