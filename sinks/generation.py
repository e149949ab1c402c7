"""Which database this is: the gate that lets its writes in, and the rounds that say how far it has published.

A restore or a promotion may take Postgres back behind what Kafka's consumers have seen. Numbers drawn then would be
drawn a second time. So a gate in Postgres (0017_generations.sql) refuses every number and offset after each start of a
server, until a worker has compared the database with the topic `tidemark-generation` (`streams/confirm.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import asyncpg
import msgspec

from sinks.database import Connection

LOCK = 0x6765_6E65  # "gene"
"""The advisory lock of whoever confirms."""

_READ = """
select instance is not distinct from this_instance() as is_open, this_instance() as instance, fence, generation,
       coalesce((select max(round) from relay_rounds), 0) as round, positions::text as positions
from installation, relay_positions
"""

_OPEN = """
update installation set instance = this_instance(), fence = greatest(fence + 1, $1) where instance is distinct from
    this_instance()
"""

# Flushed before the mark is sent, and so after every commit that the round has read. With the positions the rows of
# former rounds go.
_BEGIN_ROUND = """
with confirmed as (
    select fence, generation, coalesce((select max(round) from relay_rounds), 0) + 1 as round
    from installation where instance = this_instance()
), begun as (
    insert into relay_rounds (round) select round from confirmed
), placed as (
    update relay_positions set positions = $1::jsonb from confirmed where $1::jsonb is not null
), removed as (
    delete from relay_rounds r using confirmed c where $1::jsonb is not null and r.round < c.round
)
select fence, round, generation, (select last_value from outbox_events_id_seq) as event_id,
       (select last_value from correction_seq) as seq
from confirmed
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """What the database says of itself. is_open: the gate lets writes in. instance: the server as it runs now.

    round: the last that it knows. positions: per "topic/partition" a place before which everything is of such rounds.
    """

    is_open: bool
    instance: str
    fence: int
    generation: int
    round: int
    positions: Mapping[str, int]

    @property
    def place(self) -> tuple[int, int]:
        """How far the database has published, as it knows itself. Marks compare by the same two numbers."""
        return self.fence, self.round


_Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Mark(msgspec.Struct, frozen=True):
    """A round of the relay: its mark precedes, in `tidemark-generation`, whatever the round publishes.

    event_id, seq: the highest drawn before it; done: nothing of the round is on its way any more.
    """

    fence: Annotated[int, msgspec.Meta(ge=-1, le=2**62)]
    round: _Number
    generation: Annotated[int, msgspec.Meta(ge=0, le=2_000)]
    event_id: _Number
    seq: _Number
    done: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Marks compare by it with one another, and with the database's own."""
        return self.fence, self.round


def is_closed_gate(error: BaseException) -> bool:
    """Whether the gate has refused a write. Such an error is transient: some worker opens it."""
    return isinstance(error, asyncpg.CannotConnectNowError) and getattr(error, "table_name", None) == "installation"


async def read(connection: Connection) -> Installation:
    """Which database this is, as it was last confirmed."""
    row: Any = await connection.fetchrow(_READ)
    return Installation(**{**row, "positions": json.loads(row["positions"])})


async def read_to_confirm(connection: Connection) -> Installation:
    """The same on a server that takes writes. On a standby it raises an error that passes: nothing is to be fenced."""
    async with connection.transaction():
        await connection.execute("select from installation for no key update")
        return await read(connection)


async def is_open(connection: Connection) -> bool:
    """Whether the gate lets writes in."""
    return bool(await connection.fetchval("select instance = this_instance() from installation"))


async def open_gate(connection: Connection, fence: int) -> None:
    """Let writes in under a fence: nothing was lost that has been published."""
    await connection.execute(_OPEN, fence)


async def close_gate(connection: Connection) -> None:
    """Have the database confirmed again."""
    await connection.execute("update installation set instance = null")


async def begin_round(connection: Connection, positions: Mapping[str, int] | None = None) -> Mark:
    """Count a round of the relay, durably. Raises the gate's error while it is closed.

    positions: where the output partitions end by now; they may be some rounds old, or left as they are stored.
    """
    row = await connection.fetchrow(_BEGIN_ROUND, json.dumps(positions) if positions else None)
    if row is None:
        raise asyncpg.CannotConnectNowError("no worker has confirmed this server yet: nothing is published")
    return Mark(**row)
