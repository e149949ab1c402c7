"""The trigger table read back from its changelog: in chunks, by Faust, in spite of a kill, however long it takes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
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
    log = stack.settings.data_dir / "logs" / "triggers.log"
    return log.read_text() if log.exists() else ""


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


async def amid_a_restore(stack: Stack) -> asyncio.Task[None]:
    """The stack's start, under way: its worker has restored something, and has more to restore."""
    starting = asyncio.create_task(stack.start())

    async def says_how_far_it_is() -> bool:
        return re.search(r"changelog: \d+ of \d+ records restored", log_of(stack)) is not None

    await until(says_how_far_it_is, "some of the restore")
    return starting


async def abandoned(starting: asyncio.Task[None]) -> None:
    starting.cancel()
    with suppress(asyncio.CancelledError):
        await starting


async def test_a_worker_that_joins_does_not_wait_for_a_restore(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder)
    held = await fill(settings)
    stack = stack_with(settings, "halted_restore")
    joining = stack_with(settings.model_copy(update={"data_dir": settings.data_dir / "joining"}))
    starting = await amid_a_restore(stack)
    try:
        await joining.start()
        await starting
        log = log_of(stack)
        assert " records restored in " not in log[: log.rindex(" records to restore")], "it began anew at once"
        (first, _), *_, (last, _) = restores(log)
        assert 0 < last < first, "a part of its share, and what it had read of that is kept"
        for one in (stack, joining):
            assert await entries(one) == held
    finally:
        await abandoned(starting)
        await asyncio.gather(stack.stop(), joining.stop())


async def test_a_worker_stops_amid_a_restore(kafka: str, empty_database: str, folder: Path) -> None:
    settings = settings_for(kafka, empty_database, folder)
    await fill(settings)
    stack = stack_with(settings, "halted_restore")
    starting = await amid_a_restore(stack)
    try:
        worker = stack.workers["triggers"]
        assert worker.pid
        worker.hold(600)
        os.kill(worker.pid, signal.SIGTERM)

        async def ended() -> bool:
            return worker.restarts == 1

        await until(ended, "its end")
        assert worker.last_exit == 0, "in order"
        assert " records restored in " not in log_of(stack)
    finally:
        await abandoned(starting)
        await stack.stop()


async def test_a_recovery_that_ends_before_its_time_stops_the_worker(
    kafka: str, empty_database: str, folder: Path
) -> None:
    """Rather than leave one that is alive and never ready."""
    stack = stack_with(settings_for(kafka, empty_database, folder), "cancelled_below")
    starting = asyncio.create_task(stack.start())

    async def said_so() -> bool:
        return "the recovery of the table has ended before its time" in log_of(stack)

    try:
        await until(said_so, "the end of the worker")
    finally:
        await abandoned(starting)
