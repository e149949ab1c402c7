"""The backlog, looked at often and counted no more often than it may cost: once, whoever and how many look.

A row for each part keeps what was found, and when it may be counted again. Who finds it due counts, holding the row;
others are content with what is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import msgspec

from sinks import monitor
from sinks.database import Connection
from sinks.monitor import Gauges

_PAUSE = 300  # a part waits so many times as long as it took: together they cost less than one percent of a core
_LEDGER_SECONDS, _KEYS_SECONDS = 5.0, 300.0  # at most
_LATENCY = 0.003  # of the time that a look takes, round trips rather than work
_LOOKS = 2

_READ = "select counted_at, found, again_at <= clock_timestamp() as is_due from backlog where part = $1"

_TAKE = """
select counted_at, found, again_at <= clock_timestamp() as is_due from backlog where part = $1
for no key update
"""

# By the quickest of the last looks: a busy machine makes one slow that costs little.
_KEEP = f"""
with looks as (
    select (array_append(took, $3::float8))[greatest(1, cardinality(took) + 2 - {_LOOKS}):] as took
    from backlog where part = $1
)
update backlog set
    counted_at = clock_timestamp(), found = $2::jsonb, took = looks.took,
    again_at = clock_timestamp() + make_interval(secs => least($4, {_PAUSE} * greatest(0, (
        select min(each) from unnest(looks.took) as each) - {_LATENCY})))
from looks where part = $1
returning counted_at
"""


async def read(connection: Connection) -> tuple[datetime, Gauges]:
    """(when the older part was counted, the backlog)."""
    ledger_at, ledger = await _part(connection, "ledger", monitor.read_ledger, _LEDGER_SECONDS)
    keys_at, keys = await _part(connection, "keys", monitor.count_keys, _KEYS_SECONDS)
    return min(ledger_at, keys_at), msgspec.convert({**ledger, **keys}, Gauges)


async def _part(
    connection: Connection, part: str, count: Callable[[Connection], Awaitable[dict[str, Any]]], longest: float
) -> tuple[datetime, dict[str, Any]]:
    row = await connection.fetchrow(_READ, part)
    assert row is not None
    if row["is_due"]:
        async with connection.transaction():
            # Only the very first count is waited for.
            taken = await connection.fetchrow(_TAKE if row["found"] is None else _TAKE + " skip locked", part)
            if taken and taken["is_due"]:
                return await _count(connection, part, count, longest)
            row = taken or row
    return row["counted_at"], msgspec.json.decode(row["found"])


async def _count(
    connection: Connection, part: str, count: Callable[[Connection], Awaitable[dict[str, Any]]], longest: float
) -> tuple[datetime, dict[str, Any]]:
    started = await connection.fetchval("select clock_timestamp()")
    found = await count(connection)
    ended = await connection.fetchval("select clock_timestamp()")
    text = msgspec.json.encode(found).decode()
    took = (ended - started).total_seconds()
    counted_at: datetime = await connection.fetchval(_KEEP, part, text, took, longest)
    return counted_at, msgspec.json.decode(text)
