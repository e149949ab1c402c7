"""What a consumer of `transactions-processed` ends with that starts anywhere and may see messages twice."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg
from aiokafka import TopicPartition

from streams.settings import Settings
from streams.topics import PROCESSED
from tests.reading import read_all

Key = tuple[str, str]

_LIVE = """
select portfolio_id, security_id, s.epoch,
       coalesce(array_agg(transaction_id order by sequence) filter (where sequence is not null), '{}') as ids
from position_state s
left join (select * from position_history where superseded_epoch is null) h using (portfolio_id, security_id)
group by 1, 2, 3
"""


@dataclass(slots=True)
class _Held:
    epoch: int
    transactions: list[str] = field(default_factory=list)


class Downstream:
    """Keeps, per key, the highest epoch's transactions; a key counts from its first marker or first transaction."""

    def __init__(self) -> None:
        self.keys: dict[Key, _Held] = {}
        self.wrong: list[str] = []
        self._passed: dict[bytes, int] = {}

    def take(self, message_key: bytes, event_id: int, value: bytes) -> None:
        """The next message of a partition."""
        if event_id <= self._passed.get(message_key, 0):
            return
        self._passed[message_key] = event_id
        event = json.loads(value)
        key, epoch, sequence = (event["portfolio_id"], event["security_id"]), event["epoch"], event["sequence"]
        held = self.keys.get(key)
        if sequence == 0:
            if held and epoch <= held.epoch:
                self.wrong.append(f"{key}: marker of epoch {epoch} after {held.epoch}")
            self.keys[key] = _Held(epoch)
        elif held is None:
            if sequence == 1 and epoch == 0:
                self.keys[key] = _Held(0, [event["transaction_id"]])
        elif (epoch, sequence) != (held.epoch, len(held.transactions) + 1):
            self.wrong.append(f"{key}: {epoch}/{sequence} after {held.epoch}/{len(held.transactions)}")
        else:
            held.transactions.append(event["transaction_id"])


async def read_from(settings: Settings, starts: Sequence[float]) -> list[Downstream]:
    """A consumer for each start, which is a share of every partition's log."""
    log, ends = await read_all(settings, PROCESSED)
    found = []
    for start in starts:
        downstream = Downstream()
        for message in log:
            if message.offset >= start * ends[TopicPartition(message.topic, message.partition)]:
                downstream.take(message.key, int(dict(message.headers)["event_id"]), message.value)
        found.append(downstream)
    return found


async def check(
    settings: Settings, database: asyncpg.Pool | asyncpg.Connection, chance: random.Random, anywhere: int = 8
) -> tuple[list[str], int]:
    """(what is wrong with the topic, keys that were compared), read from its beginning and from `anywhere` places.

    To be called when the outbox is empty.
    """
    rows = await database.fetch(_LIVE)
    live = {(row["portfolio_id"], row["security_id"]): (row["epoch"], row["ids"]) for row in rows}
    wrong: list[str] = []
    compared = 0
    starts = [0.0, *(chance.random() for _ in range(anywhere))]
    for start, downstream in zip(starts, await read_from(settings, starts), strict=True):
        wrong += [f"from {start:.2f}: {line}" for line in downstream.wrong]
        if start == 0 and (missing := live.keys() - downstream.keys.keys()):
            wrong.append(f"never seen: {sorted(missing)}")
        for key, held in downstream.keys.items():
            compared += 1
            if (held.epoch, held.transactions) != live[key]:
                wrong.append(f"from {start:.2f}: {key}: epoch {held.epoch} {held.transactions}, live {live[key]}")
    return wrong, compared
