"""The trigger table and its topics lose what they like: the ledger of corrections triggers it again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from deploy.local.postgres import PostgresServer
from deploy.local.stack import Stack
from sinks import corrections
from streams import topics
from tests.topology import Event, Topology, run_topology, settings_for, until

_HURRIED = {"cleanup.policy": "compact", "segment.ms": "200", "min.cleanable.dirty.ratio": "0.001",
            "max.compaction.lag.ms": "500", "delete.retention.ms": "1000"}  # fmt: skip
_REPAIRS = 4  # a lost trigger must not cause a storm: so many repairs of one security at most, in one test


@pytest.fixture(scope="module")
async def topology(kafka: str, postgres: PostgresServer, folder: Path) -> AsyncIterator[Topology]:
    """With compaction of the job topic and the changelog as hard as it gets, and quick repairs."""
    dsn = await postgres.create_database("trigger_table")
    settings = settings_for(kafka, dsn, folder, repair_after_seconds=3)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    partitions = settings.internal_partitions
    await admin.create_topics([
        NewTopic(name, partitions, 1, topic_configs=_HURRIED)
        for name in (settings.topic(topics.JOBS), topics.changelog(settings))
    ])  # fmt: skip
    await admin.close()
    prefix, data_dir = settings.topic_prefix, settings.data_dir
    async with run_topology(
        kafka, dsn, folder, topic_prefix=prefix, data_dir=data_dir, repair_after_seconds=3
    ) as running:
        await running.pool.execute(
            "alter table corrections alter reissue_at set default clock_timestamp() + interval '3 seconds'"
        )
        await running.pool.execute("insert into reset_limit (rows_per_second) values (10000) on conflict do nothing")
        await running.send([("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in range(1, 6)])
        await running.settle()
        yield running
        for role in ("triggers", "resets"):
            running.stack.workers[role].restarts = 0  # on purpose


def holding(security: str) -> list[Event]:
    return [
        ("prices", {"security_id": security, "price_date": "2025-01-01", "price": 5}),
        ("transactions", {
            "transaction_id": security, "portfolio_id": "P", "security_id": security, "transaction_type": "BUY",
            "transaction_date": "2025-01-01T10:00:00Z", "quantity": 1, "price": 2,
            "gross_transaction_amount": str(Decimal(2)),
        }),
    ]  # fmt: skip


def late(security: str, day: int, value: int) -> Event:
    return "prices", {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value}


async def entry(topology: Topology, security: str) -> dict[str, Any] | None:
    """What the table holds of the security, by the worker's own web view."""
    try:
        async with aiohttp.ClientSession() as web:
            async with web.get(f"{topology.stack.worker_url('triggers')}/api/triggers/{security}") as response:
                return await response.json() if response.status == 200 else None
    except aiohttp.ClientError:
        return None


async def released(topology: Topology, security: str) -> bool:
    """The table has heard of the end of the security's last job; until then a new trigger would wait behind that."""
    async with aiohttp.ClientSession() as web:
        async with web.get(f"{topology.stack.worker_url('triggers')}/api/triggers/{security}") as response:
            return response.status == 404


async def in_flight_and_pending(topology: Topology, security: str, held: bool = False) -> None:
    """One job that the paused sink holds back, one trigger behind it. held: the security has its holder already."""
    if not held:
        await topology.send(holding(security))
        await topology.settle()
    await until(lambda: released(topology, security), "the end of the job before")
    await topology.pool.execute("update reset_limit set paused = true")

    async def state(name: str) -> bool:
        found = await entry(topology, security)
        return bool(found and found[name])

    await topology.send([late(security, 3, 7)])
    await until(lambda: state("in_flight"), "a job in flight")
    await topology.send([late(security, 2, 6)])
    await until(lambda: state("pending"), "a trigger behind it")


async def healed(topology: Topology, security: str) -> None:
    """Everything is right in the end, with few repairs."""
    await topology.pool.execute("update reset_limit set paused = false")
    await topology.settle()
    values = await topology.pool.fetch(
        "select market_value from daily_position_snapshots where security_id = $1 order by valuation_date", security
    )
    assert [int(row["market_value"]) for row in values] == [5, 6, 7, 7, 7]
    repairs = await topology.pool.fetchval(
        "select max(reissue_count) from corrections where security_id = $1", security
    )
    assert repairs <= _REPAIRS


async def restart_triggers(topology: Topology, then: Callable[[], Awaitable[None]]) -> None:
    """kill -9; `then` runs while the worker is stopped."""
    worker = topology.stack.workers["triggers"]
    pid, restarts = worker.pid, worker.restarts
    assert pid
    os.kill(pid, signal.SIGSTOP)
    await then()
    os.kill(pid, signal.SIGKILL)

    async def again() -> bool:
        return worker.restarts > restarts and worker.ready

    await until(again, "the triggers worker")


def table_folder(topology: Topology) -> Path:
    return topology.settings.data_dir / "worker-triggers" / "tables-triggers"


async def test_a_wiped_data_directory_is_rebuilt_from_the_changelog(topology: Topology) -> None:
    await in_flight_and_pending(topology, "WIPED")

    async def wipe() -> None:
        shutil.rmtree(table_folder(topology))

    await restart_triggers(topology, wipe)
    found = await entry(topology, "WIPED")
    assert found
    assert found["in_flight"]
    assert found["pending"]
    await healed(topology, "WIPED")


async def tombstone(topology: Topology, topic: str, security: str) -> None:
    """To the partition that holds the key."""
    producer = AIOKafkaProducer(bootstrap_servers=topology.settings.bootstrap_servers)
    await producer.start()
    await producer.send_and_wait(topic, None, key=security.encode(), headers=[("event_id", b"0")])
    await producer.stop()


async def test_a_zombies_tombstone_loses_job_and_trigger(topology: Topology) -> None:
    """It lands in the changelog behind the newer value; the next recovery knows nothing of the security."""
    await in_flight_and_pending(topology, "ZOMBIE")
    await tombstone(topology, topics.changelog(topology.settings), "ZOMBIE")

    async def wipe() -> None:
        shutil.rmtree(table_folder(topology))

    await restart_triggers(topology, wipe)
    await healed(topology, "ZOMBIE")


async def test_a_job_record_wiped_from_the_topic_is_published_again(topology: Topology) -> None:
    """Tombstoned and compacted away before the watermark sink has seen it."""
    worker = topology.stack.workers["resets"]
    pid, restarts = worker.pid, worker.restarts
    assert pid
    await topology.send(holding("JOBLESS"))
    await topology.settle()
    os.kill(pid, signal.SIGSTOP)
    try:
        await in_flight_and_pending(topology, "JOBLESS", held=True)

        async def is_gone() -> bool:
            await tombstone(topology, topology.settings.topic(topics.JOBS), "JOBLESS")  # and the segment is rolled
            records = await topology.read(topics.JOBS)
            return not any(record.key == b"JOBLESS" and record.value for record in records)

        await until(is_gone, "compaction")
    finally:
        os.kill(pid, signal.SIGKILL)

    async def again() -> bool:
        return worker.restarts > restarts and worker.ready

    await until(again, "the resets worker")
    await healed(topology, "JOBLESS")


async def lose(topology: Topology, security: str, what: str) -> None:
    """Events of the security never reach the outbox, until the trigger `lose` is dropped."""
    await topology.pool.execute(
        f"""
        create or replace function lose() returns trigger language plpgsql as $$ declare event jsonb; begin
            if new.message_key is distinct from convert_to('{security}', 'UTF8') then return new; end if;
            event := convert_from(new.value, 'UTF8')::jsonb;
            if {what} then return null; end if;
            return new;
        end $$;
        create trigger lose before insert on outbox_events for each row execute function lose();
        """
    )


async def test_a_status_that_never_came_is_asked_for_again(topology: Topology) -> None:
    """The job is done; its status is taken out of the outbox before the relay sees it."""
    await in_flight_and_pending(topology, "MUTE")
    await lose(topology, "MUTE", "new.topic = 'reprocessing-status' and event ->> 'status' = 'COMPLETE'")
    await topology.pool.execute("update reset_limit set paused = false")

    async def first_is_done() -> bool:
        return bool(await topology.pool.fetchval(
            "select true from reprocessing_jobs where security_id = 'MUTE' and status = 'COMPLETE'"))  # fmt: skip

    await until(first_is_done, "the first job")
    await topology.pool.execute("drop trigger lose on outbox_events")
    await healed(topology, "MUTE")

    async def released() -> bool:
        return await entry(topology, "MUTE") is None

    await until(released, "the entry's end")


async def test_a_table_ahead_of_its_changelog_is_thrown_away(topology: Topology) -> None:
    """The changelog is created anew under a worker that keeps its directory; then once more with a record in it."""
    await in_flight_and_pending(topology, "AHEAD")
    log = topology.settings.data_dir / "logs" / "triggers.log"

    async def recreate() -> None:
        name = topics.changelog(topology.settings)
        admin = AIOKafkaAdminClient(bootstrap_servers=topology.settings.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_topics([name])
            while name in await admin.list_topics():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await admin.create_topics(
                [NewTopic(name, topology.settings.internal_partitions, 1, topic_configs=_HURRIED)]
            )
        finally:
            await admin.close()

    await restart_triggers(topology, recreate)

    async def said_so() -> bool:
        return "is ahead of its changelog" in log.read_text()

    await until(said_so, "the message")
    await healed(topology, "AHEAD")


async def test_what_is_held_is_never_issued_again(topology: Topology) -> None:
    """As after a cancel: neither by the ledger, nor by a trigger or a job record that comes once more."""
    await in_flight_and_pending(topology, "HELD")
    await topology.pool.execute(
        "update reprocessing_jobs set status = 'CANCELLED', finished_at = clock_timestamp() where security_id = 'HELD'"
    )
    await topology.pool.execute("update corrections set held = true where security_id = 'HELD' and reset_at is null")
    seqs = [row["seq"] for row in await topology.pool.fetch(
        "select seq from corrections where security_id = 'HELD' and held order by seq")]  # fmt: skip
    assert len(seqs) == 2
    await topology.pool.execute("update reset_limit set paused = false")

    async def released() -> bool:
        return await entry(topology, "HELD") is None

    await until(released, "the entry's end")
    producer = AIOKafkaProducer(bootstrap_servers=topology.settings.bootstrap_servers)
    await producer.start()
    for seq in seqs:  # as after a consumer group that was reset
        value = {"security_id": "HELD", "earliest_impacted_date": "2025-01-02", "seq": seq, "reason": "price"}
        await producer.send_and_wait(
            topology.settings.topic(topics.TRIGGERS), json.dumps(value).encode(), key=b"HELD",
            headers=[("event_id", b"0")],
        )  # fmt: skip
    await producer.stop()
    await topology.pool.execute("update corrections set reissue_at = '-infinity' where security_id = 'HELD'")
    # Another security's trigger is lost: once that is made good, the ledger has looked at the held ones as well.
    await topology.send(holding("AFTER"))
    await lose(topology, "AFTER", "new.topic = 'reprocessing-triggers' and event ->> 'reason' <> 'repair'")
    await topology.send([late("AFTER", 3, 7)])

    async def after_is_right() -> bool:
        return bool(await topology.pool.fetchval(
            "select bool_and(right_at is not null) and bool_or(earliest_date = date '2025-01-03' and reissue_count > 0)"
            " from corrections where security_id = 'AFTER'"))  # fmt: skip

    await until(after_is_right, "another security's corrections")
    await topology.pool.execute("drop trigger lose on outbox_events")
    await until(released, "the entry's end")
    rows = await topology.pool.fetch("select held, reset_at, reissue_count from corrections where security_id = 'HELD' "
                                     "and seq = any($1)", seqs)  # fmt: skip
    assert [tuple(row) for row in rows] == [(True, None, 0)] * 2
    values = await topology.pool.fetch(
        "select market_value from daily_position_snapshots where security_id = 'HELD' order by valuation_date"
    )
    assert [int(row["market_value"]) for row in values] == [5] * 5, "visibly stale"
    async with topology.pool.acquire() as connection, connection.transaction():  # as a requeue does
        await corrections.issue(connection, [("HELD", date(2025, 1, 2))], "requeue")
        await connection.execute("update corrections set held = false where security_id = 'HELD'")
    await healed(topology, "HELD")


async def test_a_paused_sink_does_not_hold_up_a_rebalance(topology: Topology) -> None:
    """It has a window in hand that cannot end; a worker that joins gets its share, and the jobs go on."""
    await in_flight_and_pending(topology, "SHARED")
    joining = Stack(
        topology.settings.model_copy(update={"data_dir": topology.settings.data_dir / "joining"}), roles=["resets"]
    )
    await joining.start()
    try:
        await healed(topology, "SHARED")
    finally:
        await joining.stop()


async def test_the_topics_were_compacted_meanwhile(topology: Topology) -> None:
    """Or the tests above have shown less than they say."""
    consumer = AIOKafkaConsumer(bootstrap_servers=topology.settings.bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        for name in (topology.settings.topic(topics.JOBS), topics.changelog(topology.settings)):
            partitions = [TopicPartition(name, n) for n in range(topology.settings.internal_partitions)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            found = 0
            while any([await consumer.position(p) < ends[p] for p in partitions]):
                found += sum(map(len, (await consumer.getmany(timeout_ms=300)).values()))
            assert found < sum(ends.values()), name
    finally:
        await consumer.stop()
