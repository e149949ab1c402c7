"""The work of one role in a process of its own, which says how much memory it took: `python -m tests.memory.work`.

Reads what to do as JSON from stdin, and writes {"before": MiB, "peak": MiB, ...} to stdout.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import streams.app  # noqa: F401  # what every worker has loaded
from sinks import positions
from sinks.database import connect_pool
from sinks.model import Transaction
from streams.settings import load_named
from tests.relays import relays

_WAIT_SECONDS = 240.0


def resident(name: str) -> float:
    """MiB of this process, as its status names them: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) / 1024


def late(number: int, keys: int) -> Transaction:
    """One that belongs before all that its key has."""
    at = datetime(2019, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    one, ten = Decimal(1), Decimal(10)
    return Transaction(f"late{number}", f"P{number % keys:06}", "S", at, "BUY", one, ten, ten)


async def restate(dsn: str, keys: int, records: int, replay_rows: int) -> dict[str, Any]:
    """The position sink: so many late records in one transaction."""
    batch = [(number, late(number, keys)) for number in range(records)]
    async with await connect_pool(dsn) as pool, pool.acquire() as connection, connection.transaction():
        outcome = await positions.apply(connection, batch, "FIFO", replay_rows)
    return {"rebuilt": outcome.rebuilt, "replayed": outcome.replayed}


async def catch_up(dsn: str, broker: str, prefix: str, folder: str) -> dict[str, Any]:
    """The relay: until the outbox is empty."""
    settings = load_named(
        broker_url=broker, database_url=dsn, topic_prefix=prefix, data_dir=Path(folder), internal_partitions=2
    )
    async with relays(settings), await connect_pool(dsn) as pool, asyncio.timeout(_WAIT_SECONDS):
        while await pool.fetchval("select exists (select from outbox_events)"):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    return {}


def main() -> None:
    """Do what stdin says, and tell."""
    task = json.load(sys.stdin)
    work = {"restate": restate, "catch_up": catch_up}[task.pop("work")]
    before = resident("VmRSS")
    done = asyncio.run(work(**task))
    json.dump({"before": before, "peak": resident("VmHWM"), **done}, sys.stdout)


if __name__ == "__main__":
    main()
