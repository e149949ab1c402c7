"""Each protection, with what it protects from made to happen: kept, the promise holds; taken out, it is seen broken."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from sinks.database import connect, connect_pool
from streams.settings import Settings
from tests.chaos.sabotage import GATE
from tests.chaos.witness import Witness
from tests.topology import Topology, draw, settings_for, until

_RECORDS = 20
_BACKLOG = 300  # triggers


def stack_with(settings: Settings, role: str, *changes: str) -> Stack:
    program = [sys.executable, "-m", "tests.chaos.sabotage", ",".join(changes)] if changes else None
    return Stack(settings, roles=[role], **({"program": program} if program else {}))


@asynccontextmanager
async def watched(
    kafka: str, database: str, folder: Path
) -> AsyncIterator[tuple[Settings, Witness, asyncpg.Connection]]:
    """Settings of one partition per topic, a witness on the database, and a connection of ours."""
    settings = settings_for(kafka, database, folder, input_partitions=1, internal_partitions=1)
    witness = Witness(database, seed=0)
    await witness.install()
    connection = await connect(database)
    try:
        yield settings, witness, connection
    finally:
        await connection.close()


async def send_prices(settings: Settings) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    for day in range(1, _RECORDS + 1):
        value = {"security_id": "S", "price_date": f"2025-01-{day:02}", "price": day}
        await producer.send(settings.topic("prices"), json.dumps(value).encode())
    await producer.stop()


async def waiting(connection: asyncpg.Connection, kind: str) -> int:
    return await connection.fetchval("select count(*) from pg_locks where locktype = $1 and not granted", kind)


async def next_offset(connection: asyncpg.Connection) -> tuple[int, int]:
    row = await connection.fetchrow("select next_offset, epoch from kafka_offsets where topic like '%-prices'")
    return (row["next_offset"], row["epoch"]) if row else (0, 0)


@pytest.mark.parametrize("protection", ["kept", "no_fence"])
async def test_a_zombie_with_a_batch_in_hand(kafka: str, database: str, folder: Path, protection: str) -> None:
    """It is frozen before its transaction, its heir commits the same batch, and it wakes, not knowing."""
    changes = ["gated", "deaf", *({protection} - {"kept"})]
    async with watched(kafka, database, folder) as (settings, witness, connection):
        zombie = stack_with(settings, "intake", *changes)
        heir = stack_with(settings.model_copy(update={"data_dir": settings.data_dir / "heir"}), "intake", *changes)
        await zombie.start()
        log = settings.data_dir / "logs" / "intake.log"
        pid = zombie.workers["intake"].pid
        assert pid
        try:
            await connection.execute("select pg_advisory_lock($1)", GATE)
            await send_prices(settings)

            async def batches_in_hand(count: int) -> bool:
                return await waiting(connection, "advisory") == count

            async def claimed_again() -> bool:
                return await next_offset(connection) == (0, 2)

            async def heir_is_done() -> bool:
                return await next_offset(connection) == (_RECORDS, 2)

            async def zombie_has_acted() -> bool:
                stored = await connection.fetchval("select sum(inserted + replaced) from witness_effects")
                return stored > _RECORDS or "fenced" in log.read_text()

            await until(lambda: batches_in_hand(1), "a batch in the worker's hand")
            os.kill(pid, signal.SIGSTOP)
            starting = asyncio.create_task(heir.start())
            await until(claimed_again, "the claim of the heir")
            await until(lambda: batches_in_hand(2), "the same batch in the heir's hand")
            await connection.execute("select pg_advisory_unlock($1)", GATE)
            await until(heir_is_done, "the heir's commit")
            os.kill(pid, signal.SIGCONT)
            await until(zombie_has_acted, "the zombie's transaction")
            await starting
            wrong = await witness.verdict([])
            assert bool(wrong) == (protection != "kept"), wrong
        finally:
            os.kill(pid, signal.SIGCONT)
            await heir.stop()
            await zombie.stop()


@pytest.mark.parametrize("protection", ["kept", "offset_first"])
async def test_a_worker_killed_in_the_middle_of_its_transaction(
    kafka: str, database: str, folder: Path, protection: str
) -> None:
    async with watched(kafka, database, folder) as (settings, witness, connection):
        stack = stack_with(settings, "intake", *({protection} - {"kept"}))
        await stack.start()
        blocker = await connect(database)
        try:
            await blocker.execute("begin; lock table market_prices in access exclusive mode")
            await send_prices(settings)

            async def effect_waits() -> bool:
                return await waiting(connection, "relation") == 1

            async def all_passed() -> bool:
                return (await next_offset(connection))[0] == _RECORDS and (await next_offset(connection))[1] == 2

            await until(effect_waits, "the effect of the first batch")
            pid = stack.workers["intake"].pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await blocker.execute("rollback")
            await until(all_passed, "the next worker's work")
            stored = await connection.fetchval("select count(*) from market_prices")
            wrong = await witness.verdict([])
            assert (stored == _RECORDS) == (protection == "kept")
            assert bool(wrong) == (protection != "kept"), wrong
        finally:
            await blocker.close()
            await stack.stop()


@pytest.mark.parametrize("protection", ["kept", "no_stop_flow"])
async def test_records_delivered_while_the_position_moves(
    kafka: str, database: str, folder: Path, protection: str
) -> None:
    """A backlog of triggers meets a worker whose table Faust has just replayed: then records are being fetched already,
    as in every rebalance after the first. After a first restore in chunks they are not."""
    settings = settings_for(kafka, database, folder, internal_partitions=1)
    pool = await connect_pool(database, size=1)
    changes = ["no_chunks", "busy_seek", *({protection} - {"kept"})]
    published: set[bytes] = set()

    async def run_until(security: bytes) -> None:
        stack = stack_with(settings, "triggers", *changes)
        topology = Topology(stack, pool)
        await stack.start()
        try:
            await send_triggers(settings, [security.decode()])

            async def is_published() -> bool:
                published.update(record.key for record in await topology.read("reprocessing-jobs"))
                return security in published

            await until(is_published, "the job of the last trigger")
        finally:
            await stack.stop()

    try:
        await draw(database)
        await run_until(b"FIRST")  # so that the changelog has something
        shutil.rmtree(settings.data_dir / "worker-triggers")
        await send_triggers(settings, [f"S{n}" for n in range(_BACKLOG)])
        await run_until(b"LAST")  # triggers are taken in order
        assert (len(published) == _BACKLOG + 2) == (protection == "kept"), len(published)
    finally:
        await pool.close()


async def send_triggers(settings: Settings, securities: list[str]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    for seq, security in enumerate(securities, 1):
        value = {"security_id": security, "earliest_impacted_date": "2025-01-01", "seq": seq, "reason": "price"}
        await producer.send(settings.topic("reprocessing-triggers"), json.dumps(value).encode(), key=security.encode())
    await producer.stop()
