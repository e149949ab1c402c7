"""The watermark sink's window on a real Postgres: fairness, offsets, crashes, zombies, operators, failures, limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import asyncpg
import pytest
from msgspec.structs import replace
from prometheus_client import REGISTRY

from sinks import limiter, operations, resets
from sinks.database import connect_pool
from sinks.window import Window
from streams import herd as herd_module
from tests.herd import ALL_ENDED, herd_worker, issue, load, until

DAY = date(2025, 1, 6)


async def throttle(pool: asyncpg.Pool, rows_per_second: float) -> None:
    async with pool.acquire() as connection:
        await operations.throttle(connection, "test", rows_per_second)


async def statuses(pool: asyncpg.Pool) -> dict[str, str]:
    rows = await pool.fetch("select security_id, status from reprocessing_jobs order by job_id")
    return {row["security_id"]: row["status"] for row in rows}


def chunks() -> float:
    """How many this process has carried out."""
    return REGISTRY.get_sample_value("reprocessing_chunk_seconds_count") or 0


async def reset_keys(pool: asyncpg.Pool, security: str) -> int:
    return await pool.fetchval(
        "select count(*) from position_state "
        "where security_id = $1 and watermark_date = $2 and status = 'REPROCESSING'",
        security,
        date(2025, 1, 5),
    )


async def test_a_giant_does_not_block_later_batches_nor_other_partitions(
    pool: asyncpg.Pool, database: str, folder: Path
) -> None:
    small = [f"S{n}" for n in range(30)]
    await load(pool, ["GIANT"], 6_000, snapshots=False)
    await load(pool, [*small, "ELSEWHERE"], 3, snapshots=False)
    async with herd_worker(database, folder, partitions=2, reset_rows_per_second=100) as worker:
        await worker.give(0, await issue(pool, ["GIANT"], DAY))  # a minute's work at this rate
        await until(pool, "select bool_or(status = 'PROCESSING') from reprocessing_jobs")
        await worker.give(0, await issue(pool, small, DAY))
        await worker.give(1, [None, *await issue(pool, ["ELSEWHERE"], DAY)])
        await until(
            pool, "select count(*) = 31 from reprocessing_jobs where security_id <> 'GIANT' and status = 'COMPLETE'"
        )
        assert (await statuses(pool))["GIANT"] == "PROCESSING"
        assert await worker.stored(0) == 0  # the giant's record is the first
        await until(pool, "select next_offset = 2 from kafka_offsets where partition = 1")
        await throttle(pool, 1e9)
        await until(pool, ALL_ENDED)
        await until(pool, "select next_offset = 31 from kafka_offsets where partition = 0")
    rows = await pool.fetch("select distinct keys_total = keys_done as all_done from reprocessing_jobs")
    assert [row["all_done"] for row in rows] == [True]
    assert await reset_keys(pool, "GIANT") == 6_000
    assert await pool.fetchval("select count(*) from corrections where reset_at is null") == 0
    announced = await pool.fetch(
        "select convert_from(value, 'UTF8')::json ->> 'status' as status from outbox_events "
        "where topic = 'reprocessing-status' and message_key = 'GIANT' order by id"
    )
    assert [row["status"] for row in announced] == ["PENDING", "PROCESSING", "COMPLETE"]


async def test_a_crash_resumes_at_the_cursor_and_a_zombie_is_fenced(
    pool: asyncpg.Pool, database: str, folder: Path
) -> None:
    await load(pool, ["S"], 3_000, snapshots=False)
    jobs = await issue(pool, ["S"], DAY)
    async with herd_worker(database, folder, reset_rows_per_second=50, reset_chunk_rows=100) as first:
        await first.give(0, jobs)
        await until(pool, "select bool_or(keys_done > 0) from reprocessing_jobs")
        async with herd_worker(database, folder, reset_chunk_rows=100) as second:  # has claimed the partition
            done = await pool.fetchval("select keys_done from reprocessing_jobs")
            assert 0 < done < 3_000
            await second.give(0, jobs)
            await throttle(pool, 1e9)
            await until(pool, ALL_ENDED)
            await until(pool, "select next_offset = 1 from kafka_offsets")
        async with asyncio.timeout(120):
            while not first.herd.idle:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await first.stored(0) == 0
    assert await pool.fetchval("select keys_done from reprocessing_jobs") == 3_000
    assert await reset_keys(pool, "S") == 3_000


async def test_only_chunks_that_announce_wait_for_the_disk(pool: asyncpg.Pool) -> None:
    await load(pool, ["S"], 45, snapshots=False)
    waits = []
    async with pool.acquire() as connection:
        async with connection.transaction():
            (job,) = await resets.open_jobs(connection, await issue(pool, ["S"], DAY))
        while not job.ended:
            async with connection.transaction():
                job = (await resets.reset_chunk(connection, job, 15)).job
                waits.append((job.keys_done, await connection.fetchval("show synchronous_commit")))
    assert waits == [(15, "on"), (30, "off"), (45, "off"), (45, "on")]


async def test_the_last_chunk_knows_that_it_is(pool: asyncpg.Pool, database: str, folder: Path) -> None:
    await load(pool, ["S"], 30, snapshots=False)
    before = chunks()
    async with herd_worker(database, folder, reset_chunk_rows=15) as worker:
        await worker.give(0, await issue(pool, ["S"], DAY))
        await until(pool, ALL_ENDED)
        await worker.drained()
    assert chunks() - before == 2
    assert await reset_keys(pool, "S") == 30


async def test_an_operator_cancels_between_chunks_and_requeues(pool: asyncpg.Pool, database: str, folder: Path) -> None:
    await load(pool, ["S"], 2_000, snapshots=False)
    jobs = await issue(pool, ["S"], DAY)
    job_id = jobs[0].job_id
    async with herd_worker(database, folder, reset_rows_per_second=50, reset_chunk_rows=50) as worker:
        await worker.give(0, jobs)
        await until(pool, "select bool_or(keys_done > 0) from reprocessing_jobs")
        async with pool.acquire() as connection:
            cancelled = await operations.cancel_job(connection, "ann", job_id)
        done = await reset_keys(pool, "S")
        assert 0 < done < 2_000
        assert (cancelled["status"], cancelled["corrections"][0]["held"]) == ("CANCELLED", True)
        await throttle(pool, 1e9)
        await until(pool, "select next_offset = 1 from kafka_offsets")
        assert await reset_keys(pool, "S") == done  # not one key more
        assert await pool.fetchval("select count(*) from dirty_keys") == 2_000  # reset, or visibly held
        async with pool.acquire() as connection:
            with pytest.raises(operations.Refused, match="nothing to cancel"):
                await operations.cancel_job(connection, "ann", job_id)
            requeued = await operations.requeue_job(connection, "bob", job_id)
            with pytest.raises(operations.Refused, match="holds no correction any more"):
                await operations.requeue_job(connection, "bob", job_id)
        seq = requeued["requeued_as"]
        assert seq > jobs[0].seq
        trigger = await pool.fetchval(
            "select convert_from(value, 'UTF8')::json from outbox_events where topic = 'reprocessing-triggers' "
            "order by id desc limit 1"
        )
        assert f'"seq": {seq}' in trigger
        again = jobs[0].__class__(seq, "S", DAY, seq, jobs[0].created_at)
        await worker.give(0, [jobs[0], again])  # the cancelled record comes once more: it must stay cancelled
        await until(pool, "select count(*) = 1 from reprocessing_jobs where status = 'COMPLETE'")
    assert await reset_keys(pool, "S") == 2_000
    assert await pool.fetchval("select count(*) from corrections where reset_at is null or held") == 0
    actions = await pool.fetch(
        "select actor, action, arguments ->> 'job_id' as job from operator_actions order by 1, 2"
    )
    assert [tuple(row) for row in actions] == [
        ("ann", "cancel", str(job_id)),
        ("bob", "requeue", str(job_id)),
        ("test", "throttle", None),
    ]


async def test_a_trigger_that_comes_again_does_not_undo_a_cancel(
    pool: asyncpg.Pool, database: str, folder: Path
) -> None:
    await load(pool, ["S"], 10, snapshots=False)
    (job,) = await issue(pool, ["S"], DAY)
    async with herd_worker(database, folder) as worker:
        async with pool.acquire() as connection:
            await limiter.set_first_value(connection, 1e9)
            await operations.pause(connection, "ann", 1.0)
            await worker.give(0, [job])
            await until(pool, "select count(*) = 1 from reprocessing_jobs")
            await operations.cancel_job(connection, "ann", job.job_id)
            await operations.resume(connection, "ann", 1.0)
        (later,) = await issue(pool, ["S"], DAY)
        await pool.execute(
            "update corrections set held = true where seq = $1", later.seq
        )  # it covers only what is held
        await worker.give(0, [later])
        await until(pool, "select next_offset = 2 from kafka_offsets")
    assert list((await statuses(pool)).values()) == ["COMPLETE"]  # of the later one: there was nothing to do
    assert await reset_keys(pool, "S") == 0
    assert await pool.fetchval("select bool_and(held) from corrections")


async def test_a_failing_job_is_retried_then_fails_alone_with_its_reason(
    pool: asyncpg.Pool, database: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herd_module, "_PAUSE_SECONDS", 0.01)
    await load(pool, ["A", "BAD", "C"], 5, snapshots=False)
    await pool.execute(
        """
        create function refuse() returns trigger language plpgsql as $$ begin raise 'not today'; end $$;
        create trigger refuse before update on position_state for each row
            when (old.security_id = 'BAD') execute function refuse();
        """
    )
    jobs = await issue(pool, ["A", "BAD", "C"], DAY)
    async with herd_worker(database, folder) as worker:
        await worker.give(0, jobs)
        await until(pool, "select next_offset = 3 from kafka_offsets")
        assert await statuses(pool) == {"A": "COMPLETE", "BAD": "FAILED", "C": "COMPLETE"}
        failed = await pool.fetchrow("select * from reprocessing_jobs where security_id = 'BAD'")
        assert (failed["attempt_count"], "not today" in failed["failure_reason"]) == (5, True)
        assert await pool.fetchval("select held from corrections where security_id = 'BAD'")
        await pool.execute("drop trigger refuse on position_state")
        async with pool.acquire() as connection:
            seq = (await operations.requeue_job(connection, "ann", failed["job_id"]))["requeued_as"]
        await worker.give(0, [jobs[0].__class__(seq, "BAD", DAY, seq, jobs[0].created_at)])
        await until(pool, "select count(*) = 3 from reprocessing_jobs where status = 'COMPLETE'")
    assert await reset_keys(pool, "BAD") == 5


def hears_of_priority(monkeypatch: pytest.MonkeyPatch, job_id: int) -> asyncio.Event:
    """Set once a worker of this process has put the job where its priority wants it."""
    whole, heard = Window.prioritise, asyncio.Event()

    def prioritise(self: Window, priorities: Mapping[int, int]) -> None:
        whole(self, priorities)
        if job_id in priorities:
            heard.set()

    monkeypatch.setattr(Window, "prioritise", prioritise)
    return heard


async def test_priority_goes_first(
    pool: asyncpg.Pool, database: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(pool, ["A", "B"], 400, snapshots=False)
    async with herd_worker(database, folder, reset_rows_per_second=20, reset_chunk_rows=50) as worker:
        jobs = await issue(pool, ["A", "B"], DAY)
        async with pool.acquire() as connection:
            await operations.pause(connection, "ann", 20)
            await worker.give(0, jobs)
            await until(pool, "select count(*) = 2 from reprocessing_jobs")
            heard = hears_of_priority(monkeypatch, jobs[1].job_id)
            await operations.prioritise_job(connection, "ann", jobs[1].job_id, 5)
            await heard.wait()
            await operations.resume(connection, "ann", 20)
        await until(pool, "select bool_or(keys_done > 0) from reprocessing_jobs where security_id = 'B'")
        assert await pool.fetchval("select keys_done from reprocessing_jobs where security_id = 'A'") == 0
        await throttle(pool, 1e9)
        await until(pool, ALL_ENDED)


async def test_only_what_is_reset_is_charged(pool: asyncpg.Pool, database: str, folder: Path) -> None:
    """Nine holders of ten have closed: the limit counts the tenth."""
    await load(pool, ["S"], 5_000, closed=90, snapshots=False)
    async with herd_worker(database, folder, reset_rows_per_second=1_000, reset_chunk_rows=500) as worker:
        await worker.give(0, await issue(pool, ["S"], DAY))
        await until(pool, ALL_ENDED)
        await until(pool, "select next_offset = 1 from kafka_offsets")
        owed = await pool.fetchval("select extract(epoch from tat - clock_timestamp()) from reset_limit")
    assert owed < 0.6
    assert await reset_keys(pool, "S") == 500
    assert await pool.fetchval("select keys_done = 500 and keys_total = 500 from reprocessing_jobs")


async def test_the_limit_is_never_exceeded_and_gives_back(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        await limiter.set_first_value(connection, 2_000)
        await limiter.set_first_value(connection, 9)  # the stored rate counts
    granted = 0
    started = time.monotonic()

    async def ask() -> None:
        nonlocal granted
        async with pool.acquire() as connection:
            while time.monotonic() - started < 1.5:
                got = await limiter.reserve(connection, 300)
                granted += got.rows
                assert got.most == 200
                await asyncio.sleep(got.wait_seconds if not got.rows else 0)

    await asyncio.gather(ask(), ask(), ask())
    elapsed = time.monotonic() - started
    assert 0 < granted <= 2_000 * (elapsed + 0.1) + 300
    async with pool.acquire() as connection:
        assert (await limiter.reserve(connection, 5_000)).rows in (0, 200)
        before = await connection.fetchval("select tat from reset_limit")
        await limiter.give_back(connection, 500)
        assert (before - await connection.fetchval("select tat from reset_limit")).total_seconds() == pytest.approx(
            0.25
        )
        await operations.pause(connection, "ann", 1.0)
        assert (await limiter.reserve(connection, 1)).rows == 0
        state = await operations.resume(connection, "ann", 1.0)
        assert (state.paused, state.in_force) == (False, 2_000)
        assert (await limiter.reserve(connection, 1)).rows == 1


async def test_the_adaptive_rate_gives_way_to_a_slow_live_transaction(pool: asyncpg.Pool, database: str) -> None:
    live = await connect_pool(database, size=1, name="tidemark-intake")
    async with pool.acquire() as connection:
        await limiter.set_first_value(connection, 8_000)
        async with live.acquire() as intake, intake.transaction():
            await intake.execute("select pg_sleep(0.01)")
            assert await limiter.adapt(connection, 60.0, 0.0) == 8_000  # idle in transaction, and young
            await connection.execute("select pg_advisory_lock(1)")
            slow = asyncio.create_task(intake.execute("select pg_advisory_xact_lock(1)"))
            await until(pool, "select count(*) = 1 from pg_locks where locktype = 'advisory' and not granted")
            assert await limiter.adapt(connection, 0.0, 0.0) == 4_000
            assert await limiter.adapt(connection, 0.0, 0.0) == 2_000
            assert await limiter.adapt(connection, 0.0, 60.0) is None  # not its turn
            assert (await limiter.reserve(connection, 9_999)).most == 200
            await connection.execute("select pg_advisory_unlock(1)")
            await slow
        assert await limiter.adapt(connection, 60.0, 0.0) == 2_400
        state = await operations.limit_state(connection)
        assert state is not None
        assert (state.rows_per_second, state.in_force) == (8_000, 2_400)
    await live.close()


async def test_a_job_that_stands_for_no_correction_is_refused(database: str, folder: Path) -> None:
    """Nobody can take another's number by a job of his own, nor the right one with a later date."""
    async with await connect_pool(database, size=2) as pool:
        await load(pool, ["A", "B"], 3)
        (a, b) = await issue(pool, ["A", "B"], DAY)
        later = date(2025, 1, 9)
        forged = [
            replace(b, security_id="A"),
            replace(b, earliest_impacted_date=later),
            replace(a, seq=b.seq),
        ]
        async with herd_worker(database, folder) as worker:
            for job in forged:
                await worker.give(0, [job])
            await worker.drained()
            assert await pool.fetchval("select count(*) from reprocessing_jobs") == 0
            answers = await pool.fetch(_ANSWERS)
            assert [(row["security_id"], row["status"]) for row in answers] == [
                (job.security_id, "CANCELLED") for job in forged
            ]
            await worker.give(0, [a, b])
            await worker.drained()
        assert await statuses(pool) == {"A": "COMPLETE", "B": "COMPLETE"}
        assert await pool.fetchval("select count(*) from corrections where reset_at is null") == 0


_ANSWERS = """
select v->>'security_id' as security_id, v->>'status' as status
from (select id, convert_from(value, 'UTF8')::jsonb as v from outbox_events
      where topic = 'reprocessing-status') as e order by id
"""
