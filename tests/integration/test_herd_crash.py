"""A Postgres that crashes in the middle of a giant: chunks that were not on the disk are lost with their cursors."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

from deploy.local.part import Part
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from sinks.database import DatabaseError, connect_pool, is_transient, migrate, open_connection
from tests.herd import ALL_ENDED, herd_worker, issue, load

_DAY = date(2025, 1, 6)
_KEYS = 20_000
_CRASHES = 3
_SECONDS = 60.0

_TO_DISK_LATE = ("alter system set wal_writer_delay = '10s'", "alter system set wal_writer_flush_after = '1GB'")


async def test_what_a_crash_of_the_server_undoes_is_done_again(folder: Path) -> None:
    async with _server(folder / "crashing") as (part, server):
        dsn = await server.create_database("herd")
        await migrate(dsn)
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
                before = await _when(dsn, f"select keys_done from reprocessing_jobs where keys_done > {reached + 500}")
                assert part.pid
                os.kill(part.pid, signal.SIGQUIT)
                reached = await _when(dsn, "select keys_done from reprocessing_jobs")
                undone += max(0, before - reached)
            await _when(dsn, f"select 1 where ({ALL_ENDED})")
            await worker.drained()
        async with open_connection(dsn) as connection:
            job = await connection.fetchrow("select status, keys_total, keys_done from reprocessing_jobs")
            reset = await connection.fetchval(
                "select count(*) from position_state where status = 'REPROCESSING' and watermark_date < $1", _DAY
            )
            open_corrections = await connection.fetchval("select count(*) from corrections where reset_at is null")
    assert undone > 0, "no chunk was lost: this test has shown nothing"
    assert (job["status"], job["keys_total"], job["keys_done"]) == ("COMPLETE", _KEYS, _KEYS)
    assert (reset, open_corrections) == (_KEYS, 0)


@asynccontextmanager
async def _server(folder: Path) -> AsyncIterator[tuple[Part, PostgresServer]]:
    """A Postgres of its own; its part starts it again whenever it ends."""
    server = PostgresServer(folder, folder.with_suffix(".log"), Ports(folder.with_suffix(".json")))
    await server.prepare()
    part = Part("postgres", server.launch, server.ready, lambda: None)
    await part.start(_SECONDS)
    server.published = True
    try:
        yield part, server
    finally:
        await part.stop()


async def _when(dsn: str, query: str) -> Any:
    """What the query says once it says anything, whatever becomes of the server meanwhile."""
    async with asyncio.timeout(_SECONDS):
        while True:
            try:
                async with open_connection(dsn) as connection:
                    if (found := await connection.fetchval(query)) is not None:
                        return found
            except DatabaseError:  # not there now
                pass
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(0.02)
