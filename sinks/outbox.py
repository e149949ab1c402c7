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

from sinks import replay
from sinks.database import Connection, Pool, connect
from sinks.history import columns
from sinks.model import DeadLetter
from sinks.replay import Replay

CHANNEL = "tidemark_outbox"
RETRY = "retry"
"""Payload of a notification on CHANNEL that asks the relay to try held rows at once."""
_LEADER_LOCK = 0x6F75_7462  # "outb"; one relay at a time keeps the order per key
_SUCCESSION_SECONDS = 0.2  # how soon a leader is succeeded
# A whole letter, with headers, stays well below the broker's limit of 1 MiB.
_LARGEST_DEAD_LETTER, _LARGEST_DEAD_KEY, _LONGEST_DETAIL = 900_000, 16_384, 1_000
_REPLAYS, _REPLAYED_AT_ONCE = 200, 5_000
"""Replays that one read looks at, and the messages that they expand to, together: of some 500 bytes, at most 5,000."""

_BURY = """
insert into outbox_events (topic, message_key, value, headers)
select 'dead-letters', key, value, headers::jsonb
from unnest($1::bytea[], $2::bytea[], $3::text[]) with ordinality as letter (key, value, headers, place)
order by place
"""

# What waits behind an earlier replay of its key. Keys are found by digest: an index takes no long ones.
_BEHIND_A_REPLAY = """
(select exists (select from outbox_events where replay is not null))
and exists (select from outbox_events r
            where r.replay is not null and sha256(r.message_key) = sha256(o.message_key)
              and r.message_key = o.message_key and r.topic = o.topic and r.id < o.id)
"""

_BLOCKED = """
(select exists (select from outbox_events where held_at is not null))
and exists (select from outbox_events h
            where h.held_at is not null and h.topic = w.topic and sha256(h.message_key) = sha256(w.message_key)
              and h.message_key = w.message_key)
"""

_SIZE = "coalesce(octet_length(value), 0) + coalesce(octet_length(message_key), 0) + pg_column_size(headers)"

_REPLAY = ", ".join(
    f"(replay ->> '{name}'){cast} as {name}"
    for name, cast in (
        ("security_id", ""), ("portfolio_id", ""), ("epoch", "::int"), ("next", "::int"), ("last", "::int")
    )
)  # fmt: skip

# Messages, and replays by themselves: however many of those wait, live messages go on. A replay's turn comes when
# every message before it has been read, its own marker among them. Rows of a blocked key are to be held.
_READ = f"""
with plain as materialized (
    select id, topic, message_key, value, headers, {_SIZE} as size from outbox_events o
    where held_at is null and replay is null and not ({_BEHIND_A_REPLAY})
    order by id
    limit $1
), fitting as materialized (
    select * from (select *, sum(size) over (order by id rows unbounded preceding) as total from plain) as summed
    where total - size <= $2
), waiting as (
    select id, topic, message_key, value, headers, null::jsonb as replay from fitting
    union all (
        select id, topic, message_key, null, headers, replay from outbox_events o
        where held_at is null and replay is not null and not ({_BEHIND_A_REPLAY})
          and ((select count(*) < $1 from fitting) and (select count(*) from fitting) = (select count(*) from plain)
               or id < (select max(id) from fitting))
        order by id
        limit $3
    )
)
select id, topic, message_key, value, headers::text as headers, replay is not null as is_replay, {_REPLAY},
       {_BLOCKED} as blocked
from waiting as w
order by id
"""

_HELD_KEYS = """
select topic, message_key, min(id) as first from outbox_events
where held_at is not null
group by topic, message_key, case when message_key is null then id end
having min(id) > $1
order by first
limit $2
"""

_READ_HELD = f"""
select id, topic, message_key, value, headers::text as headers, replay is not null as is_replay, {_REPLAY}
from (
    select *, sum(size) over (order by id rows unbounded preceding) as total
    from (
        select *, {_SIZE} as size from outbox_events
        where held_at is not null and topic = $1 and sha256(message_key) is not distinct from sha256($2)
          and message_key is not distinct from $2 and (message_key is not null or id = $3)
        order by id
        limit $4
    ) as first
) as summed
where total - size <= $5
order by id
"""

_REMOVE = """
with removed as (delete from outbox_events where id = any($1::bigint[]))
select set_config('synchronous_commit', 'off', true)
"""

_ADVANCE = """
update outbox_events o set replay = jsonb_set(o.replay, '{next}', to_jsonb(reached.next))
from unnest($1::bigint[], $2::int[]) as reached (id, next)
where o.id = reached.id
"""

# Nobody can use what was appended to an epoch whose replay is cut short: up to the next epoch's marker it goes as well.
# Whose a message is say its own fields.
_ABANDON = """
with behind as materialized (
    select id, convert_from(value, 'UTF8')::json as event from outbox_events
    where id > $1::bigint and topic = $2 and message_key = $3 and replay is null
), own as materialized (
    select id, event ->> 'sequence' = '0' as is_marker from behind
    where event ->> 'portfolio_id' = $4 and event ->> 'security_id' = $5
), dropped as (
    delete from outbox_events
    where id = any ($1::bigint || array(select id from own where id < (select min(id) from own where is_marker)))
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
    """Queue refused records for the topic dead-letters, with where they came from and why.

    As received, but for keys and values too large for a letter: those are cut, and a header has their length.
    """
    if not letters:
        return
    await connection.execute(
        _BURY,
        [letter.key and letter.key[:_LARGEST_DEAD_KEY] for letter in letters],
        [letter.value and letter.value[:_LARGEST_DEAD_LETTER] for letter in letters],
        [json.dumps(_headers(letter)) for letter in letters],
    )


def _headers(letter: DeadLetter) -> dict[str, str]:
    detail = letter.detail[:_LONGEST_DETAIL].replace("\x00", "\\0")
    headers = {
        "reason": letter.reason,
        "detail": detail.encode(errors="backslashreplace").decode(),
        "topic": letter.topic,
        "partition": str(letter.partition),
        "offset": str(letter.offset),
    }
    if letter.value is not None and len(letter.value) > _LARGEST_DEAD_LETTER:
        headers["truncated"] = str(len(letter.value))
    if letter.key is not None and len(letter.key) > _LARGEST_DEAD_KEY:
        headers["key_truncated"] = str(len(letter.key))
    return headers


async def read(connection: Connection, rows: int, size: int) -> Window:
    """The oldest messages that may be published now: about so many rows and bytes, and a piece of each replay.

    A replay whose epoch is over is dropped. Rows of blocked keys are held.
    """
    while True:
        found = await connection.fetch(_READ, rows, size, _REPLAYS)
        if blocked := [row["id"] for row in found if row["blocked"]]:
            await connection.execute(
                "update outbox_events set held_at = clock_timestamp() where id = any($1::bigint[])", blocked
            )
        window = await _expanded(connection, [row for row in found if not row["blocked"]])
        if window.events or window.outdated or not found:
            return window


async def _expanded(connection: Connection, rows: Sequence[asyncpg.Record]) -> Window:
    waiting = {row["id"]: _replay(row) for row in rows if row["is_replay"]}
    pieces = await replay.expand(connection, list(waiting.values()), _REPLAYED_AT_ONCE) if waiting else {}
    window = Window()
    for row in rows:
        id_, topic, key, headers = row["id"], row["topic"], row["message_key"], json.loads(row["headers"])
        if not row["is_replay"]:
            window.events.append(OutboxEvent(id_, topic, key, row["value"], headers, id_))
        elif (piece := pieces.get(id_, [])) is not None:
            window.events += [
                OutboxEvent(event_id, topic, key, value, headers, id_, waiting[id_], sequence)
                for event_id, sequence, value in piece
            ]
        else:
            over = waiting[id_]
            dropped = await connection.fetchval(_ABANDON, id_, topic, key, over.portfolio_id, over.security_id)
            window.outdated += over.left + dropped - 1
    return window


def _replay(row: asyncpg.Record) -> Replay:
    return Replay(row["id"], row["security_id"], row["portfolio_id"], row["epoch"], row["next"], row["last"])


async def acknowledge(connection: Connection, events: Sequence[OutboxEvent]) -> None:
    """Remove what the broker has acknowledged. Of a replay the events are a prefix of what was read.

    Nobody waits for the disk: what a crash brings back is published again, under the same ids.
    """
    done = [event.row for event in events if event.replay is None]
    reached = {event.row: event for event in events if event.replay}
    done += [row for row, event in reached.items() if event.replay and event.sequence == event.replay.last]
    if done:
        await connection.execute(_REMOVE, done)
    if further := [(row, event.sequence + 1) for row, event in reached.items() if row not in set(done)]:
        await connection.execute(_ADVANCE, *columns(further))


async def hold(connection: Connection, event: OutboxEvent, reason: str) -> None:
    """Set a row aside that cannot be published: its key waits, nothing else does."""
    await connection.execute(
        "update outbox_events set held_at = clock_timestamp(), failure_reason = $2 where id = $1", event.row, reason
    )


async def held_keys(connection: Connection, after: int = 0, keys: int = 100) -> list[tuple[str, bytes | None, int]]:
    """Keys that are held back, in the order of their first rows from behind a row on: (topic, message key, first row).

    A row without a key is one of its own.
    """
    return [tuple(row) for row in await connection.fetch(_HELD_KEYS, after, keys)]


async def read_held(connection: Connection, held: tuple[str, bytes | None, int], rows: int, size: int) -> Window:
    """The first messages of a key that is held back, of about so many rows and bytes, up to the end of a replay."""
    while True:
        found = await connection.fetch(_READ_HELD, *held, rows, size)
        first = next((place for place, row in enumerate(found) if row["is_replay"]), len(found))
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
        select id, topic, encode(substring(message_key, 1, 2000), 'escape') as message_key,
               octet_length(value) as bytes, held_at, failure_reason
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
