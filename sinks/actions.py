"""What operators did: a row of operator_actions for each action, in the transaction of the action."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sinks.database import Connection


async def write_down(connection: Connection, actor: str, action: str, arguments: Mapping[str, Any]) -> None:
    """Who did what, to what."""
    await connection.execute(
        "insert into operator_actions (actor, action, arguments) values ($1, $2, $3::jsonb)",
        actor,
        action,
        json.dumps(arguments),
    )


async def latest(connection: Connection, limit: int = 200) -> list[dict[str, Any]]:
    """What operators did, newest first."""
    rows = await connection.fetch(
        "select action_id, at, actor, action, arguments::text as arguments from operator_actions "
        "order by action_id desc limit $1",
        limit,
    )
    return [{**row, "arguments": json.loads(row["arguments"])} for row in rows]
