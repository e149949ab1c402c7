"""`make soak MINUTES=60`: mixed load, the background auditor on, memory and disk of every process sampled.

What a stack keeps for days is kept for minutes, so that memory and disk must be level after the warm-up (the first
sixth of the time, at most ten minutes). Exits with 1 when one is not, the auditor found a difference, the books are not
right in the end, or a worker ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from aiokafka import AIOKafkaProducer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local.stack import Stack
from sinks.database import connect
from streams.settings import Settings, load_named
from tests.exported import exported
from tests.soak.load import Load
from tests.soak.retention import HEAP, KEEP_DAYS, keep_minutes
from tests.soak.sampling import Samples, verdict
from tidemark.audit import audit_books

_DRAIN_SECONDS = 300.0
_SAMPLES = 240

_PENDING = """
select (select count(*) from dirty_keys) + (select count(*) from corrections where right_at is null)
     + (select count(*) from outbox_events) as waiting,
       (select coalesce(sum(next_offset), 0) from kafka_offsets where consumer_group like '%intake') as consumed
"""
_TABLES = """
select relname as name, pg_total_relation_size(oid) / 1048576.0 as mib from pg_class
where relkind = 'r' and oid >= 16384 order by mib desc limit 8
"""
_SUMMARY = """
select (select count(*) from daily_position_snapshots) as snapshots, (select count(*) from position_state) as keys,
       (select count(*) from position_history) as history_rows, (select count(*) from corrections) as corrections,
       (select sum(epoch) from position_state)::bigint as epochs,
       (select full_pass_at is not null from audit_progress) as passed
"""


@click.command()
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--rate", default=200, show_default=True, help="Records a second.")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples there.")
def main(minutes: float, rate: int, seed: int, file: Path | None) -> None:
    """Run mixed load on a stack of its own, and judge what became of it."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="tidemark-soak-") as folder:
        Path(folder).chmod(0o711)
        report = asyncio.run(_soak(Path(folder), minutes * 60, rate, seed))
    console.print(verdict(report))
    console.print({name: value for name, value in report.items() if name not in ("samples", "processes")})
    if file:
        file.write_text(json.dumps(report, indent=1, default=str) + "\n")
    sys.exit(1 if report["wrong"] else 0)


async def _soak(folder: Path, seconds: float, rate: int, seed: int) -> dict[str, Any]:
    settings = load_named(
        data_dir=folder / "stack",
        audit_share=0.1,
        retain_superseded_history_days=KEEP_DAYS,
        retain_finished_jobs_days=KEEP_DAYS,
        broker_url=None,
        database_url=None,
    )
    os.environ["KAFKA_HEAP_OPTS"] = HEAP
    stack = Stack(settings)
    samples = Samples(folder / "stack")
    await stack.start()
    try:
        await keep_minutes(stack.settings)
        load = Load(seed)
        started = time.monotonic()
        await _drive(stack, load, samples, seconds, rate)
        loaded = time.monotonic() - started
        wrong = await _drain(stack.settings, load.sent)
        samples.take(time.monotonic() - started, _roles(stack))
        return await _report(stack, load, samples, loaded, wrong)
    finally:
        await stack.stop()


async def _drive(stack: Stack, load: Load, samples: Samples, seconds: float, rate: int) -> None:
    """Send at the rate until the time is over; sample memory and disk on the way."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.settings.bootstrap_servers, linger_ms=20)
    await producer.start()
    columns = (TextColumn("soaking"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} s"))
    started, next_sample = time.monotonic(), 0.0
    try:
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("seconds", total=seconds)
            while (now := time.monotonic() - started) < seconds:
                for topic, key, record in load.due(int(now * rate), now / seconds):
                    await producer.send(stack.settings.topic(topic), json.dumps(record).encode(), key=key.encode())
                if now >= next_sample:
                    samples.take(now, _roles(stack))
                    next_sample = now + seconds / _SAMPLES
                bar.update(task, completed=now)
                await asyncio.sleep(0.2)
    finally:
        await producer.stop()


def _roles(stack: Stack) -> dict[int | None, str]:
    return {part.pid: f"worker-{role}" for role, part in stack.workers.items()}


async def _drain(settings: Settings, sent: int) -> list[str]:
    connection = await connect(settings.dsn)
    row: Any = None
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while True:
                row = await connection.fetchrow(_PENDING)
                if row["waiting"] == 0 and row["consumed"] >= sent:
                    return []
                await asyncio.sleep(0.5)
    except TimeoutError:
        return [f"after {_DRAIN_SECONDS:.0f} s still waiting: {dict(row)}, {sent} records sent"]
    finally:
        await connection.close()


async def _report(stack: Stack, load: Load, samples: Samples, loaded: float, wrong: list[str]) -> dict[str, Any]:
    settings = stack.settings
    found = await audit_books(settings.dsn, settings.cost_basis_method, processes=2)
    background = await _differences_found(stack)
    connection = await connect(settings.dsn)
    try:
        summary = dict(await connection.fetchrow(_SUMMARY))
        tables = {row["name"]: round(float(row["mib"]), 1) for row in await connection.fetch(_TABLES)}
    finally:
        await connection.close()
    processes = samples.judge(loaded)
    wrong = [
        *wrong,
        *map(str, found.differences[:10]),
        *([f"the background auditor found {background} differences"] if background else []),
        *([] if summary.pop("passed") else ["the background auditor has not been through all keys"]),
        *([f"{found.waiting_count} keys still wait"] if found.waiting_count else []),
        *([f"{stack.restarts} workers ended"] if stack.restarts else []),
        *(
            f"{name}: {kind} is not level"
            for name, process in processes.items()
            for kind in ("memory", "disk")
            if not process[f"{kind}_level"]
        ),
    ]
    return {
        "minutes": loaded / 60,
        "records": load.sent,
        "records_per_second": load.sent / loaded,
        "audited_snapshots": found.snapshots,
        "differences": found.difference_count,
        "differences_in_background": background,
        **summary,
        "tables_mib": tables,
        "wrong": wrong,
        "processes": processes,
        "samples": samples.rows,
    }


async def _differences_found(stack: Stack) -> int:
    return int((await exported(stack, "books"))["audit_differences_total"])


if __name__ == "__main__":
    main()
