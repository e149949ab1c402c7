"""Workers of an earlier version on the schema of this one: an upgrade migrates first and replaces the workers after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from sinks.database import connect_pool, migrate
from tests.gate import open_gate
from tests.lifecycle.load import books_are_right, flowing
from tests.topology import Topology, settings_for, until

ROOT = Path(__file__).parents[2]
_EARLIER = "324ac3f"
"""Before the migrations 0007 and 0008, and before a worker looked at the schema's version."""


@pytest.fixture(scope="module")
def earlier(folder: Path) -> Path:
    """The code of that revision. Skips, saying so, where the history is not there."""
    known = subprocess.run(["git", "cat-file", "-e", f"{_EARLIER}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"NOT RUN: the history does not reach back to {_EARLIER}: clone it whole to test upgrades")
    place = folder / "earlier"
    place.mkdir()
    archive = subprocess.run(["git", "archive", _EARLIER], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=place, input=archive, check=True)
    return place


async def test_workers_of_the_version_before_work_on_this_schema(
    earlier: Path, kafka: str, empty_database: str, folder: Path
) -> None:
    settings = settings_for(kafka, empty_database, folder, repair_after_seconds=5)
    program = ["env", "-C", str(earlier), f"PYTHONPATH={earlier}", sys.executable, "-m", "tidemark"]
    old = Stack(settings, program=program)
    await migrate(settings.dsn)
    await open_gate(settings.dsn)  # as the first new worker of an upgrade does; old ones wait for it
    await old.start()
    pool = await connect_pool(settings.dsn, size=2)
    try:
        assert not (earlier / "sinks" / "migrations" / "0008_backlog.sql").exists()
        assert await pool.fetchval("select max(version) from schema_migrations") >= 8
        before = Topology(old, pool)
        async with flowing(before, seed=3) as flow:
            worker = old.workers["intake"]
            assert worker.pid
            os.kill(worker.pid, signal.SIGTERM)

            async def again() -> bool:
                return worker.restarts == 1 and worker.ready

            await until(again, "an old worker, started again on the new schema")
        await books_are_right(before, flow)
        await old.stop()
        new = Stack(settings)
        await new.start()
        try:
            after = Topology(new, pool, len(flow.sent))
            late = [("prices", {"security_id": f"S{n}", "price_date": "2025-03-03", "price": 7, "revision": 9})
                    for n in range(10)]  # fmt: skip
            await after.send(late)
            await after.settle()
            assert (await after.audit()).agrees
            assert await pool.fetchval("select count(*) from corrected_prices where price_after = 7") == len(late)
        finally:
            await new.stop()
    finally:
        await pool.close()
        await old.stop()
