"""The outbox: everything that leaves Postgres, written in the transaction that it reports (design, section 3).

Per (topic, message key) the relay must publish by id. A row that cannot be published is held, with its reason; rows of
its key are held behind it as soon as they are read, so that no read passes over them again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg
import msgspec

from sinks import replay
from sinks.database import Connection, Pool, connect
from sinks.model import DeadLetter
from sinks.replay import Replay

CHANNEL = "tidemark_outbox"
RETRY = "retry"
"""Payload of a notification on CHANNEL that asks the relay to try held rows at once."""
_LEADER_LOCK = 0x6F75_7462  # "outb"; one relay at a time keeps the order per key
_SUCCESSION_SECONDS = 0.2  # how soon a leader is succeeded
_LARGEST_DEAD_LETTER = 900_000  # bytes; with headers well below the broker's limit of 1 MiB
_REPLAYED_AT_ONCE = 5_000

_BURY = """
insert into outbox_events (topic, message_key, value, headers)
select 'dead-letters', key, value, headers::jsonb
from unnest($1::bytea[], $2::bytea[], $3::text[]) with ordinality as letter (key, value, headers, place)
order by place
"""

# Rows behind a replay wait until it is expanded; rows of a blocked key are to be held.
_READ = """
with waiting as materialized (
    select id, topic, message_key, value, headers, replay from outbox_events o
    where held_at is null
      and not ((select exists (select from outbox_events where replay is not null))
               and exists (select from outbox_events r
                           where r.replay is not null and r.message_key = o.message_key and r.topic = o.topic
                             and r.id < o.id))
    order by id
    limit $1
)
select id, topic, message_key, value, headers::text as headers, replay::text as replay,
       (select exists (select from outbox_events where held_at is not null))
       and exists (select from outbox_events h
                   where h.held_at is not null and h.topic = w.topic and h.message_key = w.message_key) as blocked
from (select *, sum(octet_length(value)) over (order by id rows unbounded preceding) as size from waiting) as w
where size is null or size - coalesce(octet_length(value), 0) <= $2
order by id
"""

_HELD_KEYS = """
select topic, message_key, min(id) as first from outbox_events
where held_at is not null
group by topic, message_key, case when message_key is null then id end
order by first
"""

_READ_HELD = """
select id, topic, message_key, value, headers::text as headers, replay::text as replay
from outbox_events
where held_at is not null and topic = $1 and message_key is not distinct from $2
  and (message_key is not null or id = $3)
order by id
limit $4
"""

_ADVANCE = """
update outbox_events set replay = jsonb_set(replay, '{next}', to_jsonb($2::int)) where id = $1
"""

# Nobody can use what was appended to an epoch whose replay is cut short: up to the next epoch's marker it goes as well.
_ABANDON = """
with marker as (
    select id from outbox_events
    where id > $1 and case when topic = $2 and message_key = $3
                           then convert_from(value, 'UTF8')::json ->> 'sequence' = '0' end
    order by id
    limit 1
), dropped as (
    delete from outbox_events
    where id >= $1 and id < coalesce((select id from marker), $1 + 1) and topic = $2 and message_key = $3
    returning 1
)
select count(*) from dropped
"""

# The relay that has said nothing for too long is stopped or cut off; it can do no harm once its session is gone.
_END_SILENT_LEADER = """
select pg_terminate_backend(a.pid)
from pg_locks l join pg_stat_activity a using (pid)
where l.locktype = 'advisory' and l.granted and l.objid::bigint = $1 and l.classid::int = 0 and l.objsubid = 1
  and l.database = (select oid from pg_database where datname = current_database())
  and a.state_change < clock_timestamp() - make_interval(secs => $2)
"""


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """One message to publish. id: its event_id; row: the outbox's row that it comes from, with its replay if it is one.

    sequence: the message's place in the replay.
    """

    id: int
    topic: str
    key: bytes | None
    value: bytes | None
    headers: dict[str, str]
    row: int
    replay: Replay | None = None
    sequence: int = 0


@dataclass(slots=True)
class Window:
    """Messages to publish next, per key in their order; and how many were dropped because their epoch is over."""

    events: list[OutboxEvent] = field(default_factory=list)
    outdated: int = 0


@dataclass(frozen=True, slots=True)
class Backlog:
    """Events not published yet; those of them that are held back; age of the oldest in seconds."""

    pending: int
    held: int
    oldest_seconds: float


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


async def read(connection: Connection, rows: int, size: int) -> Window:
    """The oldest messages that may be published now, from about so many rows and bytes.

    Replays are expanded, a piece at a time; one whose epoch is over is dropped. Rows of blocked keys are held.
    """
    while True:
        found = await connection.fetch(_READ, rows, size)
        if blocked := [row["id"] for row in found if row["blocked"]]:
            await connection.execute(
                "update outbox_events set held_at = clock_timestamp() where id = any($1::bigint[])", blocked
            )
        window = await _expanded(connection, [row for row in found if not row["blocked"]])
        if window.events or window.outdated or not found:
            return window


async def _expanded(connection: Connection, rows: Sequence[asyncpg.Record]) -> Window:
    window = Window()
    for row in rows:
        id_, topic, key, headers = row["id"], row["topic"], row["message_key"], json.loads(row["headers"])
        if row["replay"] is None:
            window.events.append(OutboxEvent(id_, topic, key, row["value"], headers, id_))
            continue
        waiting = msgspec.json.decode(row["replay"], type=Replay)
        piece = await replay.expand(connection, waiting, _REPLAYED_AT_ONCE)
        if piece is None:
            appended = await connection.fetchval(_ABANDON, id_, topic, key) - 1
            window.outdated += waiting.last - waiting.next + 1 + appended
            continue
        window.events += [
            OutboxEvent(event_id, topic, key, value, headers, id_, waiting, sequence)
            for event_id, sequence, value in piece
        ]
    return window


async def acknowledge(connection: Connection, events: Sequence[OutboxEvent]) -> None:
    """Remove what the broker has acknowledged. Of a replay the events are a prefix of what was read."""
    done = [event.row for event in events if event.replay is None]
    reached = {event.row: event for event in events if event.replay}
    done += [row for row, event in reached.items() if event.replay and event.sequence == event.replay.last]
    if done:
        await _delete(connection, done)
    for row, event in reached.items():
        await connection.execute(_ADVANCE, row, event.sequence + 1)


async def _delete(connection: Connection, ids: Sequence[int]) -> None:
    await connection.execute("delete from outbox_events where id = any($1::bigint[])", list(ids))


async def hold(connection: Connection, event: OutboxEvent, reason: str) -> None:
    """Set a row aside that cannot be published: its key waits, nothing else does."""
    await connection.execute(
        "update outbox_events set held_at = clock_timestamp(), failure_reason = $2 where id = $1", event.row, reason
    )


async def held_keys(connection: Connection) -> list[tuple[str, bytes | None, int]]:
    """The keys that are held back: (topic, message key, first row). A row without a key is one of its own."""
    return [tuple(row) for row in await connection.fetch(_HELD_KEYS)]


async def read_held(connection: Connection, held: tuple[str, bytes | None, int], rows: int) -> Window:
    """The first messages of a key that is held back, up to the end of a replay among them."""
    while True:
        found = await connection.fetch(_READ_HELD, *held, rows)
        first = next((place for place, row in enumerate(found) if row["replay"]), len(found))
        window = await _expanded(connection, found[: first + 1])
        if window.events or not found:
            return window


async def backlog(connection: Connection) -> Backlog:
    """How much waits, and for how long."""
    row = await connection.fetchrow(
        """
        select count(*) as pending, count(held_at) as held,
               coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 as age
        from outbox_events
        """
    )
    assert row is not None
    return Backlog(row["pending"], row["held"], row["age"])


async def refused(connection: Connection) -> list[dict[str, object]]:
    """The messages that cannot be published and hold their keys back, the oldest first."""
    rows = await connection.fetch(
        """
        select id, topic, encode(message_key, 'escape') as message_key, octet_length(value) as bytes, held_at,
               failure_reason
        from outbox_events where failure_reason is not null order by id
        """
    )
    return [dict(row) for row in rows]


async def ask_to_retry(connection: Connection) -> None:
    """Have the relay try at once what is held back."""
    await connection.execute(f"notify {CHANNEL}, '{RETRY}'")


async def wake(pool: Pool) -> None:
    """Tell the relay that events wait. A hint only, in a transaction of its own: NOTIFY serialises commits."""
    async with pool.acquire() as connection:
        await connection.execute(f"notify {CHANNEL}")


@asynccontextmanager
async def leadership(dsn: str, stopping: Callable[[], bool], silent_seconds: float) -> AsyncIterator[Connection | None]:
    """A connection that holds the relay's leadership while open; None when stopping came first.

    Asks often and does not wait for the lock: a session that waits holds its snapshot, and with it the whole database's
    vacuum. A leader whose session has been silent for `silent_seconds` is frozen or cut off, and its session is ended.
    """
    connection = await connect(dsn)
    try:
        leads = False
        while not (leads or stopping()):
            leads = await connection.fetchval("select pg_try_advisory_lock($1)", _LEADER_LOCK)
            if not leads:
                await connection.execute(_END_SILENT_LEADER, _LEADER_LOCK, silent_seconds)
                await asyncio.sleep(_SUCCESSION_SECONDS)
        yield connection if leads else None
    finally:
        await connection.close()
