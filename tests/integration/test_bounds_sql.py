"""What has no bound of its own: keys of any length, ids with bars, thousands of replays that wait at once."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinks import outbox, positions, replay
from sinks.database import Pool
from sinks.model import DeadLetter, Transaction, position_key
from sinks.replay import Replay
from tests.engine import Engine

LETTER_BYTES = 1_000_000  # below the broker's 1 MiB, with what the record batch adds
_IDS = st.text(st.sampled_from(r"AB|\é"), min_size=1, max_size=6)


def trade(id_: str, portfolio: str, security: str, day: int, **more: Any) -> Transaction:
    at = datetime(2025, 3, 1, tzinfo=UTC) + timedelta(days=day)
    return Transaction(id_, portfolio, security, at, "BUY", Decimal(1), Decimal(10), Decimal(10), **more)


async def book(pool: Pool, *batch: Transaction, replay_rows: int = 10_000) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await positions.apply(connection, list(enumerate(batch)), "FIFO", replay_rows)


# -- message keys --------------------------------------------------------------------------------------------------


@given(st.lists(_IDS, min_size=3, max_size=5), st.sampled_from(["|", "\\|", "|\\", "\\"]), st.data())
def test_no_two_positions_share_a_message_key(parts: list[str], between: str, data: st.DataObject) -> None:
    """Two ids that are parts of one text, cut at two places."""
    first, second = (data.draw(st.integers(1, len(parts) - 1)) for _ in range(2))
    one, other = ((between.join(parts[:cut]), between.join(parts[cut:])) for cut in (first, second))
    assert (position_key(*one) == position_key(*other)) is (one == other)


def test_ids_without_bars_and_backslashes_stand_as_they_are() -> None:
    assert position_key("Fonds 7/é", "A.B-C:%") == "Fonds 7/é|A.B-C:%".encode()
    assert position_key("A|B", "C") == rb"A\|B|C"
    assert position_key("A", "B|C") == rb"A|B\|C"
    assert position_key("A\\", "|") == rb"A\\|\|"


async def test_postgres_makes_the_same_message_keys(pool: Pool) -> None:
    chance = random.Random(1)
    ids = ["".join(chance.choices("AB|\\é😀", k=chance.randrange(1, 8))) for _ in range(2_000)]
    found = await pool.fetch(
        "select position_key(p, s) from unnest($1::text[], $2::text[]) with ordinality as k (p, s, n) order by n",
        ids[:1_000],
        ids[1_000:],
    )
    assert [row[0] for row in found] == list(map(position_key, ids[:1_000], ids[1_000:]))


async def test_what_a_replay_drops_is_its_own_keys(pool: Pool) -> None:
    """(A|B, C) and (A, B|C) had one message key: a replay of the first that was cut short took the other's event."""
    await book(pool, trade("a1", "A|B", "C", 3), trade("b1", "A", "B|C", 3))
    await book(pool, trade("a2", "A|B", "C", 1), replay_rows=0)
    await book(pool, trade("b2", "A", "B|C", 5))
    await book(pool, trade("a3", "A|B", "C", 0), replay_rows=0)
    found: dict[bytes, list[str | None]] = {}
    async with pool.acquire() as connection:
        while (window := await outbox.read(connection, 100, 2**20)).events:
            for event in window.events:
                if event.topic == "transactions-processed":
                    assert event.value is not None
                    text = event.value.decode()
                    name = next((id_ for id_ in ("a1", "a2", "a3", "b1", "b2") if f'"{id_}"' in text), None)
                    found.setdefault(event.key or b"", []).append(name)
            await outbox.acknowledge(connection, window.events)
    assert found == {rb"A\|B|C": ["a1", None, None, "a3", "a2", "a1"], rb"A|B\|C": ["b1", "b2"]}


async def test_an_upgrade_between_a_replay_and_its_end_drops_no_other_keys_event(pool: Pool) -> None:
    """Rows that an older version wrote: two positions under one message key. Their own fields say whose they are."""
    await book(pool, trade("a1", "A|B", "C", 3), trade("b1", "A", "B|C", 3))
    await pool.execute("delete from outbox_events")
    await book(pool, trade("a2", "A|B", "C", 1), replay_rows=0)
    await book(pool, trade("b2", "A", "B|C", 5))
    await book(pool, trade("a3", "A|B", "C", 0), replay_rows=0)
    await pool.execute("update outbox_events set message_key = 'A|B|C' where topic = 'transactions-processed'")
    values: list[bytes] = []
    async with pool.acquire() as connection:
        while (window := await outbox.read(connection, 100, 2**20)).events or window.outdated:
            values += [event.value for event in window.events if event.value]
            await outbox.acknowledge(connection, window.events)
    assert sum(b'"b2"' in value for value in values) == 1
    assert await pool.fetchval("select count(*) from outbox_events") == 0


# -- keys of any length --------------------------------------------------------------------------------------------


async def test_a_letter_is_smaller_than_the_broker_takes_whatever_the_record_was(pool: Pool) -> None:
    detail = "\x00\ud800" + "😀" * 5_000
    letter = DeadLetter("t" * 249, 7, 2**62, os.urandom(1_300_000), os.urandom(950_000), "malformed", detail)
    small = DeadLetter("prices", 0, 1, b"key", b"", "malformed", "x")
    async with pool.acquire() as connection:
        await outbox.bury(connection, [letter, small, DeadLetter("prices", 0, 2, None, None, "malformed", "x")])
        cut, whole, empty = (await outbox.read(connection, 100, 2**30)).events
    assert letter.key is not None
    assert letter.value is not None
    assert cut.key == letter.key[: len(cut.key or b"")]
    assert cut.value == letter.value[: len(cut.value or b"")]
    assert (cut.headers["truncated"], cut.headers["key_truncated"]) == ("950000", "1300000")
    headers = sum(len(name) + len(value.encode()) for name, value in cut.headers.items())
    assert len(cut.key or b"") + len(cut.value or b"") + headers < LETTER_BYTES
    assert (whole.key, whole.value, empty.key, empty.value) == (b"key", b"", None, None)
    assert {"truncated", "key_truncated"}.isdisjoint(whole.headers | empty.headers)


async def test_a_row_with_a_key_of_any_length_can_be_held_and_holds_what_follows(pool: Pool) -> None:
    key = os.urandom(1_200_000)
    await pool.executemany(
        "insert into outbox_events (topic, message_key, value) values ($1, $2, $3)",
        [("prices", key, b"1"), ("prices", key + b"x", b"2"), ("prices", key, b"3"), ("prices", b"other", b"4")],
    )
    async with pool.acquire() as connection:
        first = (await outbox.read(connection, 100, 2**30)).events
        assert [event.value for event in first] == [b"1", b"2", b"3", b"4"]
        await outbox.hold(connection, first[0], "too large")
        assert [event.value for event in (await outbox.read(connection, 100, 2**30)).events] == [b"2", b"4"]
        (held,) = await outbox.held_keys(connection)
        assert [e.value for e in (await outbox.read_held(connection, held, 100, 2**30)).events] == [b"1", b"3"]
        assert [e.value for e in (await outbox.read_held(connection, held, 100, 1)).events] == [b"1"]
        (shown,) = await outbox.refused(connection)
        assert len(str(shown["message_key"])) < 10_000


async def test_no_index_has_bytes_of_any_length(pool: Pool) -> None:
    """Ids have at most 200 characters; whatever else is text or bytes is hashed, or one of few words."""
    found = await pool.fetch(
        """
        select c.relname as table_name, a.attname as column_name from pg_index i
        join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
        where n.nspname = 'tidemark' and a.atttypid in ('bytea'::regtype, 'text'::regtype, 'jsonb'::regtype)
        """
    )
    columns = {(row["table_name"], row["column_name"]) for row in found}
    ids = {"security_id", "portfolio_id", "transaction_id"}
    words = {"consumer_group", "topic", "status", "part"}  # of settings, of this program
    assert {name for _, name in columns} <= ids | words, columns


async def test_the_longest_ids_fit_into_every_index(database: str) -> None:
    """200 characters of four bytes each, as random as they can be: nothing is left for compression."""
    chance = random.Random(2)
    long = ["".join(chr(chance.randrange(0x10000, 0x10FFFF)) for _ in range(200)) for _ in range(5)]
    fields = {"portfolio_id": long[0], "security_id": long[1], "transaction_type": "BUY", "quantity": 1, "price": 1}
    engine = await Engine.on(database)
    try:
        for number, day in enumerate(["2025-03-03", "2025-03-05", "2025-03-01"]):
            await engine.take("transactions", [{"transaction_id": long[2 + number], "transaction_date": day, **fields}])
            await engine.take("prices", [{"security_id": long[1], "price_date": day, "price": 3}])
        await engine.take("business-dates", [{"business_date": f"2025-03-0{day}"} for day in range(1, 7)])
        await engine.take("prices", [{"security_id": long[1], "price_date": "2025-03-02", "price": 4}])
        await engine.drain()
        assert await engine.pool.fetchval("select count(*) from dirty_keys") == 0
        assert await engine.pool.fetchval("select count(*) from daily_position_snapshots") == 6
    finally:
        await engine.pool.close()


# -- what a round of the relay takes -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(12, 60))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_replays_share_a_round(lengths: list[int], messages: int) -> None:
    waiting = [Replay(row, "S", "P", 1, 1, length) for row, length in enumerate(lengths)]
    found = {each.row: count for each, count in replay.shares(waiting, messages)}
    assert sum(found.values()) == min(messages, sum(lengths))  # what one leaves is the others'
    assert found.keys() == set(range(len(lengths)))
    assert all(0 < count <= lengths[row] for row, count in found.items())


@pytest.mark.parametrize("rows", [1, 3, 1_000])
async def test_a_round_is_bounded_however_many_replays_wait(
    pool: asyncpg.Pool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live messages of other keys go on meanwhile, and each key's come in order, its marker before its replay."""
    monkeypatch.setattr(outbox, "_REPLAYED_AT_ONCE", 20)
    monkeypatch.setattr(outbox, "_REPLAYS", 7)
    keys = [f"P{number}" for number in range(30)]
    await book(pool, *[trade(f"{p}-{n}", p, "S", n) for p in keys for n in range(1, 8)])
    await pool.execute("delete from outbox_events")
    await book(pool, *[trade(f"{p}-0", p, "S", 0) for p in keys], replay_rows=0)
    await book(pool, *[trade(f"Q{n}", f"Q{n}", "S", 1) for n in range(5)])
    ids: dict[bytes | None, list[int]] = {}
    sequences: dict[bytes | None, list[int]] = {}
    rounds = live_after = 0
    async with pool.acquire() as connection:
        while events := (await outbox.read(connection, rows, 2**20)).events:
            rounds += 1
            assert sum(event.replay is not None for event in events) <= 20
            for event in events:
                ids.setdefault((event.key or b"") + event.topic.encode(), []).append(event.id)
                if event.replay:
                    sequences.setdefault(event.key, []).append(event.sequence)
            if not live_after and any((event.key or b"").startswith(b"Q") for event in events):
                live_after = rounds
            await outbox.acknowledge(connection, events)
    assert all(of_key == sorted(set(of_key)) for of_key in ids.values())
    assert sequences == {position_key(p, "S"): list(range(1, 9)) for p in keys}
    assert rounds >= 30 * 8 / 20
    assert rows < 1_000 or live_after == 1
