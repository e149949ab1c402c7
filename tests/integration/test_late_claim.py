"""A claim that comes late, from a worker that is no longer the owner, does not leave the partition without one."""

from __future__ import annotations

from pathlib import Path

from tests.topology import run_topology


async def test_a_worker_fenced_by_a_late_claim_starts_anew(kafka: str, empty_database: str, folder: Path) -> None:
    async with run_topology(kafka, empty_database, folder, ["intake"], session_timeout_seconds=5) as topology:
        dates = [("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in (1, 2, 3)]
        await topology.send(dates[:1])
        await topology.settle()
        await topology.pool.execute("update kafka_offsets set epoch = epoch + 1 where topic like '%business-dates'")
        await topology.send(dates[1:])
        await topology.settle()
        assert await topology.pool.fetchval("select count(*) from business_dates") == 3
        intake = topology.stack.workers["intake"]
        assert intake.restarts >= 1
        intake.restarts = 0  # that worker had to end; no other may have
