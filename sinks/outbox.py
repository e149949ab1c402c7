"""The outbox: everything that leaves Postgres, written in the transaction that it reports (design, section 3)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sinks.database import Connection, Pool, connect
from sinks.model import DeadLetter

CHANNEL = "tidemark_outbox"
_LEADER_LOCK = 0x6F75_7462  # "outb"; one relay at a time keeps the order per key
_LARGEST_DEAD_LETTER = 900_000  # bytes; with headers well below the broker's limit of 1 MiB

_BURY = """
insert into outbox_events (topic, message_key, value, headers)
select 'dead-letters', key, value, headers::jsonb
from unnest($1::bytea[], $2::bytea[], $3::text[]) with ordinality as letter (key, value, headers, place)
order by place
"""

_READ = """
select id, topic, message_key, value, headers::text as headers, created_at
from outbox_events
order by id
limit $1
"""


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """One message to publish; id is its event_id."""

    id: int
    topic: str
    key: bytes | None
    value: bytes | None
    headers: dict[str, str]


async def bury(connection: Connection, letters: Sequence[DeadLetter]) -> None:
    """Queue refused records for the topic dead-letters, as received, with where they came from and why."""
    if not letters:
        return
    await connection.execute(
        _BURY,
        [letter.key for letter in letters],
        [None if letter.value is None else letter.value[:_LARGEST_DEAD_LETTER] for letter in letters],
        [json.dumps(_headers(letter)) for letter in letters],
    )


def _headers(letter: DeadLetter) -> dict[str, str]:
    headers = {
        "reason": letter.reason,
        "detail": letter.detail[:1000].replace("\x00", "\\0"),
        "topic": letter.topic,
        "partition": str(letter.partition),
        "offset": str(letter.offset),
    }
    if letter.value is not None and len(letter.value) > _LARGEST_DEAD_LETTER:
        headers["truncated"] = str(len(letter.value))
    return headers


async def read(connection: Connection, limit: int) -> list[OutboxEvent]:
    """The oldest events that wait, by id. Per message key that is the order in which they were written."""
    rows = await connection.fetch(_READ, limit)
    return [
        OutboxEvent(row["id"], row["topic"], row["message_key"], row["value"], json.loads(row["headers"]))
        for row in rows
    ]


async def delete(connection: Connection, ids: Sequence[int]) -> None:
    """Remove what the broker has acknowledged."""
    await connection.execute("delete from outbox_events where id = any($1::bigint[])", list(ids))


async def backlog(connection: Connection) -> tuple[int, float]:
    """(events that wait, age of the oldest in seconds)."""
    row = await connection.fetchrow(
        """
        select count(*) as pending,
               coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 as age
        from outbox_events
        """
    )
    assert row is not None
    return row["pending"], row["age"]


async def wake(pool: Pool) -> None:
    """Tell the relay that events wait. A hint only, in a transaction of its own: NOTIFY serialises commits."""
    async with pool.acquire() as connection:
        await connection.execute(f"notify {CHANNEL}")


@asynccontextmanager
async def leadership(dsn: str) -> AsyncIterator[Connection | None]:
    """A connection that holds the relay's leadership while open, or None when another relay leads."""
    connection = await connect(dsn)
    try:
        leads = await connection.fetchval("select pg_try_advisory_lock($1)", _LEADER_LOCK)
        yield connection if leads else None
    finally:
        connection.terminate() if connection.is_closed() else await connection.close(timeout=5)
