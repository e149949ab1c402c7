"""Operators steer a running topology by its commands: pause, impact, throttle, cancel, requeue, reprocess."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from deploy.local.postgres import PostgresServer
from tests.topology import Event, Topology, run_topology
from tidemark.main import main


@pytest.fixture(scope="module")
async def herd(kafka: str, postgres: PostgresServer, folder: Path) -> AsyncIterator[Topology]:
    dsn = await postgres.create_database("topology_herd")
    async with run_topology(
        kafka, dsn, folder, reset_chunk_rows=20, repair_after_seconds=3, debounce_seconds=0.2
    ) as topology:
        await topology.send([("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in range(1, 11)])
        await topology.send([buy(f"H{n:03}", security) for n in range(300) for security in ("S", "T")])
        await topology.send([price(security, 1, 10) for security in ("S", "T")])
        await topology.settle()
        yield topology


def buy(portfolio: str, security: str) -> Event:
    return "transactions", {
        "transaction_id": f"{portfolio}-{security}", "portfolio_id": portfolio, "security_id": security,
        "transaction_date": "2025-01-01T10:00:00Z", "transaction_type": "BUY", "quantity": 1, "price": 10,
    }  # fmt: skip


def price(security: str, day: int, value: float) -> Event:
    return "prices", {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value}


async def command(herd: Topology, *arguments: str) -> Any:
    """What `tidemark ... --json` prints."""
    result = await asyncio.to_thread(
        CliRunner().invoke, main, [*arguments, "--json"], env=herd.settings.environment(), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def refused(herd: Topology, *arguments: str) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=herd.settings.environment())
    assert result.exit_code != 0
    assert result.output.count("\n") == 1, result.output
    return result.output


async def newest_job(herd: Topology, security: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The security's newest job, once it is as wanted."""
    seen: Any = None
    try:
        async with asyncio.timeout(120):
            while True:
                found = await command(herd, "jobs", "list", "--security", security, "--limit", "1")
                seen = found[0] if found else None
                if seen and wanted(seen):
                    return seen
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"the newest job of {security}: {seen}") from None


@pytest.fixture(autouse=True)
async def _unpaused(herd: Topology) -> AsyncIterator[None]:
    """Whatever a test leaves behind, the next one is not paused."""
    yield
    await command(herd, "resume", "--actor", "test")


async def test_an_operator_steers_a_herd(herd: Topology) -> None:
    assert (await command(herd, "pause", "--actor", "ann"))["in_force"] == 0
    assert (await command(herd, "impact", "S", "2025-01-05"))["keys"] == 300
    await herd.send([price("S", 5, 11)])
    job = await newest_job(herd, "S", lambda job: job["earliest_impacted_date"] == "2025-01-05")
    await command(herd, "throttle", "10", "--actor", "ann")
    assert (await newest_job(herd, "S", lambda job: True))["status"] == "PENDING"  # paused still
    await command(herd, "resume", "--actor", "ann")
    await newest_job(herd, "S", lambda job: 0 < job["keys_done"] < 300)
    cancelled = await command(herd, "jobs", "cancel", str(job["job_id"]), "--actor", "ann")
    assert cancelled["status"] == "CANCELLED"
    async with aiohttp.ClientSession() as web:
        await _released(web, f"{herd.stack.worker_url('triggers')}/api/triggers/S")
    await command(herd, "throttle", "100000")
    assert 0 < await herd.pool.fetchval("select count(*) from dirty_keys where security_id = 'S'") <= 300
    assert "is CANCELLED" in await refused(herd, "jobs", "cancel", str(job["job_id"]))
    requeued = await command(herd, "jobs", "requeue", str(job["job_id"]), "--actor", "bob")
    await newest_job(herd, "S", lambda job: job["job_id"] == requeued["requeued_as"] and job["status"] == "COMPLETE")
    await herd.settle()
    values = await herd.pool.fetch(
        "select distinct valuation_date >= '2025-01-05' as late, market_value from daily_position_snapshots "
        "where security_id = 'S' order by 1"
    )
    assert [tuple(row) for row in values] == [(False, 10), (True, 11)]
    shown = await command(herd, "jobs", "show", str(requeued["requeued_as"]))
    assert {each["phase"] for each in shown["corrections"]} == {"RIGHT"}
    heard = [json.loads(record.value) for record in await herd.read("reprocessing-status")]
    assert "CANCELLED" in {each["status"] for each in heard if each["job_id"] == job["job_id"]}
    assert {each["status"] for each in heard if each["job_id"] == requeued["requeued_as"]} >= {
        "COMPLETE",
        "BOOKS_RIGHT",
    }
    audited = await herd.pool.fetch("select actor, action from operator_actions where actor in ('ann', 'bob')")
    assert [tuple(row) for row in audited] == [
        ("ann", "pause"), ("ann", "throttle"), ("ann", "resume"), ("ann", "cancel"), ("bob", "requeue"),
    ]  # fmt: skip


async def test_a_restatement_of_many_dates_is_one_or_two_jobs(herd: Topology) -> None:
    before = await herd.pool.fetchval("select count(*) from reprocessing_jobs where security_id = 'T'")
    await herd.send([price("T", day, 20 + day) for day in range(10, 0, -1)])
    await herd.settle()
    jobs = await herd.pool.fetchval("select count(*) from reprocessing_jobs where security_id = 'T'")
    assert 1 <= jobs - before <= 2


async def test_an_operator_corrects_anew(herd: Topology) -> None:
    await herd.pool.execute("update daily_position_snapshots set market_value = 0 where valuation_date >= '2025-01-08'")
    assert len((await command(herd, "reprocess", "--security", "S", "2025-01-08"))["seqs"]) == 1
    assert (await command(herd, "reprocess", "--portfolio", "H000", "2025-01-08"))["keys"] == 2
    assert (await command(herd, "reprocess", "--key", "H001", "T", "2025-01-08"))["keys"] == 1
    await herd.settle()
    wrong = await herd.pool.fetchval("select count(*) from daily_position_snapshots where market_value = 0")
    assert wrong == 298 * 3
    await command(herd, "reprocess", "--security", "T", "2025-01-08")
    await herd.settle()
    audit = await herd.audit()
    assert (audit.differences, audit.waiting) == ([], [])
    assert "unknown" in await refused(herd, "reprocess", "--security", "X", "2025-01-08")
    assert "there is no job" in await refused(herd, "jobs", "show", "999999")
    assert "from 1 to 1,000,000,000" in await refused(herd, "throttle", "0")


async def _released(web: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(120):
        while True:
            async with web.get(url) as response:
                if response.status == 404:
                    return
            await asyncio.sleep(0.1)
