"""What consumers end with that follow the documented rules, and whether anything was ever numbered twice."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from decimal import Decimal
from typing import Any

import asyncpg

from streams import topics
from streams.settings import Settings
from tests import processed
from tests.reading import read_all

_OUTPUTS = (topics.PROCESSED, topics.VALUATIONS, topics.STATUS, topics.TRIGGERS, topics.DEAD_LETTERS)
_VALUES = ("quantity", "cost_basis", "price", "market_value", "unrealized_gain_loss")

_VALUED = """
select position_key(s.portfolio_id, s.security_id) as key, coalesce(v.quantity, 0) as quantity,
       coalesce(v.cost_basis, 0) as cost_basis, v.price, v.market_value, v.unrealized_gain_loss
from position_state s
left join daily_position_snapshots v on v.security_id = s.security_id and v.portfolio_id = s.portfolio_id
    and v.valuation_date = (select max(business_date) from business_dates)
"""


async def check(settings: Settings, pool: asyncpg.Pool, chance: random.Random) -> list[str]:
    """What is wrong, read from the topics' beginnings. To be called when nothing is left to do."""
    wrong, compared = await processed.check(settings, pool, chance)
    assert compared > 0
    return [*wrong, *await _stale_valuations(settings, pool), *await _twice(settings)]


async def _stale_valuations(settings: Settings, pool: asyncpg.Pool) -> list[str]:
    log, _ = await read_all(settings, topics.VALUATIONS)
    passed: dict[bytes, int] = {}
    held: dict[bytes, dict[str, Any]] = {}
    for message in log:
        if (event_id := _event_id(message)) > passed.get(message.key, 0):
            passed[message.key] = event_id
            held[message.key] = json.loads(message.value, parse_float=Decimal)
    wrong = []
    for row in await pool.fetch(_VALUED):
        told = held.get(row["key"])
        values = {name: None if told is None or told[name] is None else Decimal(told[name]) for name in _VALUES}
        if told is None and not row["quantity"]:
            continue  # it was never valued
        if not values["quantity"] and not row["quantity"]:
            continue  # closed: of no value either way
        if values != {name: row[name] for name in _VALUES}:
            wrong.append(f"{row['key']!r}: valued {values}, the books say {dict(row)}")
    return wrong


async def _twice(settings: Settings) -> list[str]:
    """An event id, a correction's seq, a job's id, a place of a position's epoch: each has one content for ever."""
    contents: dict[Any, set[Any]] = defaultdict(set)
    log, _ = await read_all(settings, *_OUTPUTS, topics.JOBS)
    for message in log:
        topic = message.topic.removeprefix(settings.topic_prefix)
        if message.value is None:
            continue
        event = json.loads(message.value) if topic != topics.DEAD_LETTERS else {}
        match topic:
            case topics.JOBS:
                contents["job", event["job_id"]].add((message.key, event["earliest_impacted_date"]))
                continue
            case topics.PROCESSED:
                place = (event["epoch"], event["sequence"])
                said = {name: value for name, value in event.items() if name != "replayed"}
                contents["place", message.key, place].add(json.dumps(said, sort_keys=True))
            case topics.TRIGGERS if event["reason"] != "repair":
                contents["seq", event["seq"]].add(message.key)
        contents["event id", _event_id(message)].add((topic, message.key, message.value))
    return [f"{name} twice: {found}" for name, found in contents.items() if len(found) > 1]


def _event_id(message: Any) -> int:
    return int(dict(message.headers)["event_id"])
