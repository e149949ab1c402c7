"""The trigger table read back from its changelog: in chunks, by Faust, in spite of a kill, however long it takes."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from sinks.database import migrate
from streams import topics
from streams.settings import Settings
from streams.topics import ensure_topics
from tests.topology import settings_for, until

KEYS, ROUNDS = 1_500, 3

Entries = dict[str, int]


def value(security: str, seq: int) -> bytes:
    job = {
        "job_id": seq, "security_id": security, "earliest_impacted_date": "2025-01-02", "seq": seq,
        "created_at": "2025-11-26T10:00:00Z", "job_type": "RESET_WATERMARKS",
    }  # fmt: skip
    return json.dumps({"in_flight": job, "pending": None}).encode()


async def fill(settings: Settings) -> Entries:
    """A changelog that writes each key several times and deletes every fifth last; seq by security that it holds."""
    await migrate(settings.dsn)
    await ensure_topics(settings)
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    topic, held = topics.changelog(settings), {}
    for turn in range(ROUNDS):
        for number in range(KEYS):
            security = f"SEC{number:05}"
            deleted = turn == ROUNDS - 1 and number % 5 == 0
            held[security] = turn * KEYS + number + 1
            await producer.send(topic, None if deleted else value(security, held[security]), key=security.encode())
            if deleted:
                del held[security]
    await producer.stop()
    return held


def stack_with(settings: Settings, *changes: str) -> Stack:
    program = [sys.executable, "-m", "tests.chaos.sabotage", ",".join(changes)] if changes else None
    return Stack(settings, roles=["triggers"], **({"program": program} if program else {}))


def log_of(stack: Stack) -> str:
    return (stack.settings.data_dir / "logs" / "triggers.log").read_text()


def restores(log: str) -> list[tuple[int, int]]:
    """(records to restore, records in the changelog) of each recovery."""
    return [(int(some), int(all_)) for some, all_ in re.findall(r"changelog: (\d+) of (\d+) records to restore", log)]


async def entries(stack: Stack) -> Entries:
    """What the table holds by the worker's own listing: seq in flight by security."""
    async with aiohttp.ClientSession() as web:
        async with web.get(f"{stack.worker_url('triggers')}/api/triggers?limit=10000") as response:
            rows: list[dict[str, Any]] = await response.json()
            assert response.status == 200, rows
            return {row["security_id"]: row["in_flight"]["seq"] for row in rows}


@pytest.mark.parametrize("way", ["in_chunks", "no_chunks"])
async def test_the_whole_table_is_restored(kafka: str, empty_database: str, folder: Path, way: str) -> None:
    """In chunks Faust has nothing left to replay; where they cannot be read it replays everything."""
    settings = settings_for(kafka, empty_database, folder)
    held = await fill(settings)
    stack = stack_with(settings, *({way} - {"in_chunks"}))
    await stack.start()
    try:
        assert await entries(stack) == held
        log = log_of(stack)
        assert restores(log) == [(KEYS * ROUNDS, KEYS * ROUNDS)]
        assert ("Restoring state from changelog topics" in log) == (way == "no_chunks")
        assert stack.restarts == 0
    finally:
        await stack.stop()


async def test_a_worker_killed_while_it_restores_goes_on_where_it_was(
    kafka: str, empty_database: str, folder: Path
) -> None:
    """The kill falls among the records that write each key for the last time: none of them may be left out."""
    settings = settings_for(kafka, empty_database, folder)
    held = await fill(settings)
    stack = stack_with(settings, "dies_restoring")
    await stack.start()
    try:
        assert stack.restarts == 1
        (first, whole), (second, _) = restores(log_of(stack))
        assert first == whole == KEYS * ROUNDS
        assert 0 < second < whole / 6, "what was restored before the kill is kept"
        assert await entries(stack) == held
    finally:
        await stack.stop()


async def test_a_restore_may_take_its_time(kafka: str, empty_database: str, folder: Path) -> None:
    """Longer than Faust's limit of a step, and than a member of a group may leave off polling."""
    settings = settings_for(kafka, empty_database, folder)
    held = await fill(settings)
    stack = stack_with(settings, "slow_restore")
    await stack.start()
    try:
        log = log_of(stack)
        seconds = re.search(r"changelog: \d+ records restored in ([\d.]+) s", log)
        assert seconds
        assert float(seconds[1]) > settings.session_timeout_seconds
        assert re.search(rf"changelog: \d+ of {KEYS * ROUNDS} records restored", log), "how far it is"
        assert log.count("Executing _on_partitions_assigned") == 1, "it has left its group"
        assert await entries(stack) == held
    finally:
        await stack.stop()


async def test_a_recovery_that_ends_before_its_time_stops_the_worker(
    kafka: str, empty_database: str, folder: Path
) -> None:
    """Rather than leave one that is alive and never ready."""
    stack = stack_with(settings_for(kafka, empty_database, folder), "cancelled_below")
    starting = asyncio.create_task(stack.start())
    log = stack.settings.data_dir / "logs" / "triggers.log"

    async def said_so() -> bool:
        return log.exists() and "the recovery of the table has ended before its time" in log.read_text()

    try:
        await until(said_so, "the end of the worker")
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
