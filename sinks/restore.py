"""After a restore of the database: sequences go on behind everything that was published before (design, Outbox)."""

from __future__ import annotations

from dataclasses import dataclass

from sinks.database import Connection, DatabaseError

_MARGIN = 1_000_000  # what is published out of order, or was drawn and not published yet, lies closer

_OTHERS = """
select count(*) from pg_stat_activity
where application_name like 'tidemark%' and datname = current_database() and pid <> pg_backend_pid()
"""

_MOVE = "select setval($1::regclass, greatest($2::bigint, (select last_value from {sequence})))"


@dataclass(frozen=True, slots=True)
class Sequences:
    """The last value of the outbox's event_id and of the corrections' seq."""

    event_id: int
    seq: int


async def move_sequences(connection: Connection, published: Sequences) -> Sequences:
    """Move both sequences well behind what was published; returns where they stand. May be repeated.

    Raises DatabaseError while workers are connected: what they write meanwhile would carry ids already used.
    """
    if others := await connection.fetchval(_OTHERS):
        raise DatabaseError(f"{others} sessions of workers are open: stop all workers first")
    outbox: str = await connection.fetchval("select pg_get_serial_sequence('outbox_events', 'id')")
    return Sequences(
        await connection.fetchval(_MOVE.format(sequence=outbox), outbox, published.event_id + _MARGIN),
        await connection.fetchval(_MOVE.format(sequence="correction_seq"), "correction_seq", published.seq + _MARGIN),
    )
