"""A burst of triggers costs few writes of the table, and none of them is acknowledged before its effect is kept."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local.part import Part
from deploy.local.stack import Stack
from streams import topics
from streams.settings import Settings
from streams.topics import ensure_topics
from tests.exported import exported
from tests.reading import read_all
from tests.topology import Topology, draw, run_topology, settings_for, until

_BURST = 2_000
_OTHERS = 100


def trigger(security: str, seq: int, day: int) -> tuple[bytes, bytes]:
    value = {"security_id": security, "earliest_impacted_date": f"2025-01-{day:02}", "seq": seq, "reason": "price"}
    return security.encode(), json.dumps(value).encode()


async def send(settings: Settings, records: list[tuple[bytes, bytes]]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, linger_ms=20)
    await producer.start()
    try:
        for key, value in records:
            await producer.send(settings.topic(topics.TRIGGERS), value, key=key, partition=0)
    finally:
        await producer.stop()


def burst() -> list[tuple[bytes, bytes]]:
    """One security again and again, others in between."""
    many = [trigger("S", seq, 28 - seq % 20) for seq in range(2, _BURST)]
    for number in range(_OTHERS):
        many.insert(number * 19, trigger(f"T{number}", 1, 5))
    return many


async def entry(topology: Topology, security: str) -> dict[str, Any] | None:
    async with aiohttp.ClientSession() as web:
        async with web.get(f"{topology.stack.worker_url('triggers')}/api/triggers/{security}") as response:
            return await response.json() if response.status == 200 else None


async def end(settings: Settings, topic: str) -> int:
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.bootstrap_servers)
    await consumer.start()
    try:
        place = TopicPartition(topic, 0)
        return int((await consumer.end_offsets([place]))[place])
    finally:
        await consumer.stop()


async def all_acknowledged(settings: Settings) -> bool:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        committed = await admin.list_consumer_group_offsets(settings.group("triggers"))
        place = TopicPartition(settings.topic(topics.TRIGGERS), 0)
        return place in committed and committed[place].offset == await end(settings, place.topic)
    finally:
        await admin.close()


async def as_all_triggers_say(topology: Topology) -> bool:
    found = await entry(topology, "S")
    pending = found and found["pending"]
    return bool(pending and (pending["seq"], pending["earliest_impacted_date"]) == (_BURST - 1, "2025-01-09"))


async def in_flight(topology: Topology, security: str) -> bool:
    found = await entry(topology, security)
    return bool(found and found["in_flight"])


async def test_a_burst_costs_few_writes(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(kafka, empty_database, folder, roles=["triggers"], internal_partitions=1) as topology:
        settings = topology.settings
        await draw(settings.dsn)
        await send(settings, [trigger("S", 1, 28)])
        await until(lambda: in_flight(topology, "S"), "a job in flight")
        before = await end(settings, topics.changelog(settings))
        pid = topology.stack.workers["triggers"].pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await send(settings, burst())
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: as_all_triggers_say(topology), "the last trigger's effect")
        await until(lambda: all_acknowledged(settings), "everything acknowledged")
        written = await end(settings, topics.changelog(settings)) - before
        print(f"{written} changelog records for {_BURST - 2} triggers of one security and {_OTHERS} of others")
        assert _OTHERS < written < _OTHERS + _BURST / 20
        assert await in_flight(topology, "T0")
        assert await in_flight(topology, f"T{_OTHERS - 1}")


async def test_nothing_of_a_burst_is_lost_with_its_worker(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(kafka, empty_database, folder, roles=["triggers"], internal_partitions=1) as topology:
        await draw(topology.settings.dsn)
        await send(topology.settings, [trigger("S", 1, 28)])
        await until(lambda: in_flight(topology, "S"), "a job in flight")
        worker = topology.stack.workers["triggers"]
        jobs = topology.settings.topic(topics.JOBS)
        for kills in range(1, 4):
            first = await end(topology.settings, jobs)
            await send(topology.settings, burst() + [trigger(f"K{kills}-{n}", 1, 5) for n in range(_OTHERS)])
            await until(partial(published_since, topology.settings, jobs, first), "the burst under way")
            await kill(worker)
        await until(lambda: as_all_triggers_say(topology), "the last trigger's effect")
        await until(lambda: all_acknowledged(topology.settings), "everything acknowledged")
        published = {record.key for record in await topology.read(topics.JOBS)}
        assert published == {key for key, _ in burst()} | {
            f"K{kills}-{n}".encode() for kills in range(1, 4) for n in range(_OTHERS)
        }
        for security in ("T0", "K1-0", f"K3-{_OTHERS - 1}"):
            assert await in_flight(topology, security), security
        worker.restarts = 0  # on purpose


@pytest.mark.parametrize("protection", ["kept", "ack_first"])
async def test_no_trigger_is_acknowledged_before_the_broker_has_its_job(
    kafka: str, empty_database: str, folder: Path, protection: str
) -> None:
    """There is no job topic while the worker decides, commits what it has acknowledged, and dies."""
    settings = settings_for(kafka, empty_database, folder, internal_partitions=1)
    changes = ",".join(["tells_commits", *({protection} - {"kept"})])
    stack = Stack(settings, roles=["triggers"], program=[sys.executable, "-m", "tests.chaos.sabotage", changes])
    await stack.start()
    try:
        worker = stack.workers["triggers"]
        await delete(settings, topics.JOBS)
        await send(settings, [trigger(f"T{number}", 1, 5) for number in range(_OTHERS)])
        await until(lambda: taken(stack), "a trigger taken")
        before = commits(stack)  # the second one from now on begins after what is acknowledged already
        await until(lambda: has_committed(stack, before + 2), "two commits")
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        await ensure_topics(settings)
        await until(lambda: all_acknowledged(settings), "everything acknowledged")
        published = {record.key for record in (await read_all(settings, topics.JOBS))[0]}
        lost = {f"T{number}".encode() for number in range(_OTHERS)} - published
        assert bool(lost) == (protection != "kept"), lost
    finally:
        await stack.stop()


async def test_a_rebalance_and_a_stop_end_a_run_that_is_open(kafka: str, empty_database: str, folder: Path) -> None:
    """The first worker keeps its run open; then a second one joins, and takes half of the partitions over."""
    settings = settings_for(kafka, empty_database, folder, internal_partitions=2)
    program = [sys.executable, "-m", "tests.chaos.sabotage", "open_runs"]
    first = Stack(settings, roles=["triggers"], program=program)
    second = Stack(settings.model_copy(update={"data_dir": folder / "second"}), roles=["triggers"])
    await first.start()
    try:
        await draw(settings.dsn)
        await send(settings, [trigger("S", 1, 5)])
        await until(lambda: taken(first), "a trigger taken")
        await second.start()
        await until(lambda: all_acknowledged(settings), "the run ended for the rebalance")
        await send(settings, [trigger("S", seq, 5) for seq in (2, 3)])
        await first.stop()
        await until(lambda: all_acknowledged(settings), "the run ended for the stop")
        assert "not stopped in order" not in (settings.data_dir / "logs" / "triggers.log").read_text()
    finally:
        await first.stop()
        await second.stop()


async def kill(worker: Part) -> None:
    """Kill it; returns when another one serves."""
    assert worker.pid
    before = worker.restarts
    os.kill(worker.pid, signal.SIGKILL)

    async def again() -> bool:
        return worker.restarts > before and worker.ready

    await until(again, "another worker")


async def delete(settings: Settings, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([settings.topic(topic)])
    finally:
        await admin.close()


async def has_committed(stack: Stack, times: int) -> bool:
    return commits(stack) >= times


def commits(stack: Stack) -> int:
    return (stack.settings.data_dir / "logs" / "triggers.log").read_text().count("has committed")


async def taken(stack: Stack) -> bool:
    return 'trigger_events_total{kind="trigger"}' in await exported(stack, "triggers")


async def published_since(settings: Settings, topic: str, first: int) -> bool:
    return await end(settings, topic) > first
