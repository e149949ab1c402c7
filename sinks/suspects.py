"""The record that a partition in trial is at: named before it is read, so that every death belongs to one record.

A death counts only where it is *vouched* for: another record of the topic passed just before, in the same process. So
a broken program and a broken database, which let no record pass, condemn none.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinks.database import Connection
from sinks.offsets import Partition

_OPEN = "consumer_group = $1 and topic = $2 and partition = $3 and condemned_at is null"

_NAME = """
insert into suspects as s (consumer_group, topic, partition, record_offset) values ($1, $2, $3, $4)
on conflict (consumer_group, topic, partition) where condemned_at is null do update set
    record_offset = excluded.record_offset,
    deaths = case when s.record_offset = excluded.record_offset then s.deaths else 0 end,
    vouched = s.vouched and s.record_offset = excluded.record_offset,
    neighbours = case when s.record_offset = excluded.record_offset then s.neighbours else 0 end,
    failure = case when s.record_offset = excluded.record_offset then s.failure end
returning record_offset, deaths, vouched, neighbours, failure
"""

_PASS = f"""
update suspects set record_offset = $4, deaths = 0, vouched = true, neighbours = 0, failure = null where {_OPEN}
"""

_NEIGHBOUR = f"update suspects set neighbours = neighbours + 1, vouched = false where {_OPEN}"

_VOUCH = f"update suspects set vouched = true where {_OPEN}"

_INTERRUPT = f"update suspects set vouched = false where {_OPEN}"

_FAIL = f"""
update suspects set deaths = deaths + vouched::int, vouched = false, failure = $5
where {_OPEN} and record_offset = $4
returning deaths
"""

_CONDEMN = f"""
with old as (delete from suspects where condemned_at < clock_timestamp() - interval '30 days')
update suspects set condemned_at = clock_timestamp(), record_offset = $4 where {_OPEN}
"""

_VERDICTS = "select count(*) from suspects where topic = $1 and condemned_at > clock_timestamp() - interval '1 hour'"

_FORGET = f"delete from suspects where {_OPEN}"


@dataclass(frozen=True, slots=True)
class Suspect:
    """deaths: failures that count; vouched: another record passed last; neighbours: tries with others so far.

    failure: how it ended the last time; None: it was not tried yet.
    """

    record_offset: int
    deaths: int = 0
    vouched: bool = False
    neighbours: int = 0
    failure: str | None = None


async def name(connection: Connection, group: str, place: Partition, offset: int) -> Suspect:
    """Say that the record at the offset, or the first one behind it, is about to be read."""
    row = await connection.fetchrow(_NAME, group, *place, offset)
    assert row is not None
    return Suspect(**row)


async def passed(connection: Connection, group: str, place: Partition, offset: int) -> None:
    """The record passed: name the next one, which this one vouches for."""
    await connection.execute(_PASS, group, *place, offset)


async def try_neighbour(connection: Connection, group: str, place: Partition) -> None:
    """Another record is about to be tried, so a death from here on is not the suspect's."""
    await connection.execute(_NEIGHBOUR, group, *place)


async def vouch(connection: Connection, group: str, place: Partition) -> None:
    """Another record has passed, here and now."""
    await connection.execute(_VOUCH, group, *place)


async def fail(connection: Connection, group: str, place: Partition, offset: int, failure: str) -> int | None:
    """Note how the record at the offset has failed; returns the failures that count, None when it is not named."""
    deaths: int | None = await connection.fetchval(_FAIL, group, *place, offset, failure[:1000].replace("\x00", ""))
    return deaths


async def condemn(connection: Connection, group: str, place: Partition, offset: int) -> None:
    """Close the record's case. The caller passes its offset in the same transaction."""
    await connection.execute(_CONDEMN, group, *place, offset)


async def interrupt(connection: Connection, group: str, place: Partition) -> None:
    """The trial was ended in order: that is no death of the record it was at."""
    await connection.execute(_INTERRUPT, group, *place)


async def verdicts(connection: Connection, topic: str) -> int:
    """How many records of the topic were condemned in the last hour."""
    count: int = await connection.fetchval(_VERDICTS, topic)
    return count


async def forget(connection: Connection, group: str, place: Partition) -> None:
    """The trial is over."""
    await connection.execute(_FORGET, group, *place)
