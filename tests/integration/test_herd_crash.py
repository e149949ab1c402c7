"""A Postgres that crashes in the middle of a giant: chunks that were not on the disk are lost with their cursors."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import date
from pathlib import Path
from typing import Any

from deploy.local.part import Part
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from sinks.database import Pool, connect_pool, is_transient, migrate
from tests.gate import open_gate
from tests.herd import ALL_ENDED, herd_worker, issue, load
from tests.servers import serving

_DAY = date(2025, 1, 6)
_KEYS = 20_000
_CRASHES = 3
_SECONDS = 120.0

_TO_DISK_LATE = ("alter system set wal_writer_delay = '10s'", "alter system set wal_writer_flush_after = '1GB'")


async def test_what_a_crash_of_the_server_undoes_is_done_again(folder: Path) -> None:
    place = folder / "crashing"
    server = PostgresServer(place, place.with_suffix(".log"), Ports(place.with_suffix(".json")))
    async with serving("postgres", server) as part:
        dsn = await server.create_database("herd")
        await migrate(dsn)
        await open_gate(dsn)
        async with await connect_pool(dsn, size=2) as pool:
            for statement in _TO_DISK_LATE:
                await pool.execute(statement)
            await pool.execute("select pg_reload_conf()")
            await load(pool, ["S"], _KEYS, snapshots=False)
            jobs = await issue(pool, ["S"], _DAY)
            undone = 0
            async with herd_worker(dsn, folder, reset_rows_per_second=4_000, reset_chunk_rows=100) as worker:
                await worker.give(0, jobs)
                reached = 0
                for _ in range(_CRASHES):
                    further = f"select keys_done from reprocessing_jobs where keys_done > {reached + 500}"
                    before = await _when(pool, further)
                    await _crash(part)
                    await _let_in(dsn)
                    reached = await _when(pool, "select keys_done from reprocessing_jobs")
                    undone += max(0, before - reached)
                await _when(pool, f"select 1 where ({ALL_ENDED})")
                await worker.drained()
            job = await pool.fetchrow("select status, keys_total, keys_done from reprocessing_jobs")
            reset = await pool.fetchval(
                "select count(*) from position_state where status = 'REPROCESSING' and watermark_date < $1", _DAY
            )
            open_corrections = await pool.fetchval("select count(*) from corrections where reset_at is null")
    assert undone > 0, "no chunk was lost: this test has shown nothing"
    assert (job["status"], job["keys_total"], job["keys_done"]) == ("COMPLETE", _KEYS, _KEYS)
    assert (reset, open_corrections) == (_KEYS, 0)


async def _crash(part: Part) -> None:
    """Returns when the process is gone: until then it may still answer."""
    pid = part.pid
    assert pid
    os.kill(pid, signal.SIGQUIT)
    while part.pid == pid:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def _let_in(dsn: str) -> None:
    """As a worker with Kafka does once the server is back."""
    async with asyncio.timeout(_SECONDS):
        while True:
            try:
                return await open_gate(dsn)
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(0.02)


async def _when(pool: Pool, query: str) -> Any:
    """What the query says once it says anything, whatever becomes of the server meanwhile."""
    async with asyncio.timeout(_SECONDS):
        while True:
            try:
                if (found := await pool.fetchval(query)) is not None:
                    return found
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(0.02)
