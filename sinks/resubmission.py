"""Sending a refused record again: through the outbox, with who did it in the same transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sinks import actions
from sinks.database import Connection

_ACTION = "resubmit"


@dataclass(frozen=True, slots=True)
class Resubmission:
    """A record for an input topic, and the dead letter that it comes from (partition and offset of dead-letters)."""

    topic: str
    key: bytes | None
    value: bytes
    partition: int
    offset: int


async def resubmit(connection: Connection, actor: str, record: Resubmission) -> None:
    """Queue the record for its topic, once or again; the sinks decide what becomes of it."""
    origin = {"dead_letter": f"{record.partition}:{record.offset}", "topic": record.topic}
    async with connection.transaction():
        await connection.execute(
            "insert into outbox_events (topic, message_key, value, headers) values ($1, $2, $3, $4::jsonb)",
            record.topic,
            record.key,
            record.value,
            json.dumps({"resubmitted_from": origin["dead_letter"]}),
        )
        await actions.write_down(connection, actor, _ACTION, origin)


async def resubmitted(connection: Connection) -> dict[str, str]:
    """Who sent a dead letter again last, by `partition:offset`; of the latest thousand."""
    rows = await connection.fetch(
        """
        select arguments ->> 'dead_letter' as letter, actor || ' at ' || to_char(at, 'YYYY-MM-DD HH24:MI') as who
        from operator_actions where action = $1 order by action_id desc limit 1000
        """,
        _ACTION,
    )
    return {row["letter"]: row["who"] for row in reversed(rows)}
