"""The roster of workers, as each reports itself (0005_workers.sql). For people and metrics; nothing decides by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sinks.database import Connection

GONE_SECONDS = 20.0  # after so long without a report a worker counts as gone

_FORGET = "delete from workers where seen_at < clock_timestamp() - interval '15 minutes'"

_REPORT = """
insert into workers (worker_id, role, host, pid, web_url, started_at, seen_at, missing, partitions, restore_remaining,
    keys_reset, keys_valued)
values ($1, $2, $3, $4, $5, clock_timestamp(), clock_timestamp(), $6, $7, $8, $9, $10)
on conflict (worker_id) do update set
    seen_at = excluded.seen_at, missing = excluded.missing, partitions = excluded.partitions,
    restore_remaining = excluded.restore_remaining, keys_reset = excluded.keys_reset, keys_valued = excluded.keys_valued
"""

_READ = f"""
select *, extract(epoch from clock_timestamp() - seen_at)::float8 as silent_seconds,
       seen_at < clock_timestamp() - interval '{GONE_SECONDS} seconds' as gone
from workers
order by role, started_at
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of itself.

    missing: what keeps it from being ready. restore_remaining: changelog records. keys_reset, keys_valued: since it
    started.
    """

    worker_id: UUID
    role: str
    host: str
    pid: int
    web_url: str
    missing: str | None
    partitions: Sequence[str]
    restore_remaining: int
    keys_reset: int
    keys_valued: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A row of the roster. gone: silent for more than GONE_SECONDS."""

    worker_id: UUID
    role: str
    host: str
    pid: int
    web_url: str
    started_at: datetime
    seen_at: datetime
    missing: str | None
    partitions: list[str]
    restore_remaining: int
    keys_reset: int
    keys_valued: int
    silent_seconds: float
    gone: bool


async def report(connection: Connection, found: Report) -> None:
    """Enter the worker, or bring its row up to date; forget who has been silent for long."""
    await connection.execute(_FORGET)
    await connection.execute(
        _REPORT,
        found.worker_id,
        found.role,
        found.host,
        found.pid,
        found.web_url,
        found.missing,
        list(found.partitions),
        found.restore_remaining,
        found.keys_reset,
        found.keys_valued,
    )


async def leave(connection: Connection, worker_id: UUID) -> None:
    """Remove a worker that stops."""
    await connection.execute("delete from workers where worker_id = $1", worker_id)


async def read(connection: Connection) -> list[Worker]:
    """All workers that have reported lately, by role and age."""
    return [Worker(**row) for row in await connection.fetch(_READ)]
