"""What was known when: every version of a key's history can be asked for until retention removes it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import date, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result

from sinks import retention
from sinks.bitemporal import History
from sinks.database import DatabaseError, connect
from streams.records import decode_transaction
from tests import scenarios
from tests.integration.test_positions_sql import book, trade
from tidemark.audit import audit_books
from tidemark.main import main

_LIVE = """
select portfolio_id, security_id, h.epoch, sequence, transaction_id, position_date, quantity, cost_basis,
       realized_gain_loss
from position_history h where superseded_epoch is null
order by portfolio_id, security_id, sequence
"""

Rows = list[tuple[Any, ...]]


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(database)
    yield connection
    await connection.close()


async def live(connection: asyncpg.Connection) -> Rows:
    return [tuple(row) for row in await connection.fetch(_LIVE)]


async def known(connection: asyncpg.Connection, function: str, *arguments: object) -> Rows:
    places = ", ".join(f"${n + 1}" for n in range(len(arguments)))
    rows = await connection.fetch(
        f"""
        select h.portfolio_id, h.security_id, h.epoch, h.sequence, h.transaction_id, h.position_date, h.quantity,
               h.cost_basis, h.realized_gain_loss
        from position_state s, {function}(s.portfolio_id, s.security_id, {places}) h
        order by h.portfolio_id, h.security_id, h.sequence
        """,
        *arguments,
    )
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("seed", range(2))
async def test_every_version_that_was_ever_live_is_found_again(connection: asyncpg.Connection, seed: int) -> None:
    chance = random.Random(seed)
    arrived = [decode_transaction(json.dumps(r).encode()) for t, r in scenarios.generate(seed, events=500)
               if t == "transactions"]  # fmt: skip
    chance.shuffle(arrived)
    versions: list[tuple[datetime, Rows]] = []
    of_epoch: dict[tuple[str, str, int], Rows] = {}
    while arrived:
        size = chance.choice([1, 4, 15])
        await book(connection, *arrived[:size])
        del arrived[:size]
        rows = await live(connection)
        versions.append((await connection.fetchval("select clock_timestamp()"), rows))
        for portfolio, security, epoch in await connection.fetch(
            "select portfolio_id, security_id, epoch from position_state"
        ):
            of_epoch[portfolio, security, epoch] = [row for row in rows if row[:2] == (portfolio, security)]
    assert len(versions) > 20
    for moment, rows in versions:
        assert await known(connection, "history_known_at", moment) == rows
        day = chance.choice([row[5] for row in rows])
        last = {row[:2]: row for row in rows if row[5] <= day}
        assert {row[:2]: row for row in await known(connection, "position_as_of", day, moment)} == last
    for (portfolio, security, epoch), rows in of_epoch.items():
        found = await History(connection, portfolio, security).of_epoch(epoch)
        assert [(r["sequence"], r["transaction_id"], r["quantity"]) for r in found] == [
            (row[3], row[4], row[6]) for row in rows
        ]
    # Between two rows of one database transaction there is no moment: every time is that of a whole batch.
    times = await connection.fetchval("select count(distinct recorded_at) from position_history")
    assert times <= len(versions)
    assert await connection.fetchval(
        "select count(*) from position_history where superseded_at <= recorded_at"
    ) == 0  # fmt: skip


async def test_the_clock_may_go_back_but_versions_do_not(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 10, 1))
    await connection.execute("update position_history set recorded_at = recorded_at + interval '1 hour'")
    await book(connection, trade("a", "BUY", 50, 10, 1, revision=1))
    rows = await connection.fetch("select recorded_at, superseded_at from position_history order by epoch")
    assert rows[0]["recorded_at"] < rows[0]["superseded_at"] == rows[1]["recorded_at"]


async def test_the_difference_a_correction_made(connection: asyncpg.Connection) -> None:
    await book(connection, trade("a", "BUY", 100, 200, 1), trade("b", "BUY", 50, 220, 3))
    await book(connection, trade("c", "SELL", 40, 215, 2))
    await book(connection, trade("b", "BUY", 50, 220, 3, revision=1, cancelled=True))
    history = History(connection, "P", "S")
    columns = ("transaction_id", "change", "old_sequence", "new_sequence", "old_quantity", "new_quantity",
               "new_realized_gain_loss")  # fmt: skip
    assert [tuple(row[name] for name in columns) for row in await history.difference(0, 1)] == [
        ("c", "added", None, 2, None, 60, 600),
        ("b", "changed", 2, 3, 150, 110, 600),
    ]
    assert [tuple(row[name] for name in columns) for row in await history.difference(1, 2)] == [
        ("b", "removed", 3, None, 110, None, None),
    ]
    assert await history.difference(2, 2) == []


async def test_retention_removes_old_versions_step_by_step_and_refuses_questions_about_them(
    connection: asyncpg.Connection, database: str
) -> None:
    await book(connection, *(trade(f"a{n}", "BUY", 10, 10, n) for n in range(1, 8)))
    await book(connection, trade("late", "BUY", 10, 10, 1))
    await connection.execute(
        "update position_history set recorded_at = recorded_at - interval '9 days', "
        "superseded_at = superseded_at - interval '8 days'"
    )
    await book(connection, trade("later", "BUY", 10, 10, 2))
    before = await live(connection)
    total = await connection.fetchval("select count(*) from position_history where superseded_epoch = 1")
    removed = []
    while step := await retention.purge_history(connection, timedelta(days=7), 2):
        removed.append(step)
    assert total == sum(removed) == 6
    assert max(removed) == 2
    assert await live(connection) == before
    assert await connection.fetchval("select count(*) from position_history where superseded_epoch is not null") > 0
    history = History(connection, "P", "S")
    now = await connection.fetchval("select clock_timestamp()")
    with pytest.raises(DatabaseError, match="removed by retention"):
        await history.known_at(now - timedelta(days=8, hours=1))
    with pytest.raises(DatabaseError, match="epochs of this key before 1"):
        await history.difference(0, 2)
    assert len(await history.known_at(now - timedelta(days=1))) == 8  # as it was before the last correction
    assert len(await history.of_epoch(1)) == 8
    assert (await audit_books(database, "FIFO")).differences == []


async def test_finished_jobs_go_by_age_unless_a_correction_needs_them(connection: asyncpg.Connection) -> None:
    await connection.execute(
        """
        insert into reprocessing_jobs (job_id, security_id, earliest_impacted_date, seq, status, created_at,
                                       finished_at)
        select n, 'S', date '2025-01-01', n, status, now(), now() - make_interval(days => age)
        from (values (1, 'COMPLETE', 40), (2, 'FAILED', 40), (3, 'COMPLETE', 10), (4, 'CANCELLED', 40),
                     (5, 'PROCESSING', null)) as j (n, status, age)
        """
    )
    await connection.execute("insert into corrections (seq, security_id, earliest_date, reason, job_id, held)"
                             " values (2, 'S', '2025-01-01', 'price', 2, true)")  # fmt: skip
    assert await retention.purge_jobs(connection, timedelta(days=30), 1) == 1
    assert await retention.purge_jobs(connection, timedelta(days=30)) == 1
    assert [row[0] for row in await connection.fetch("select job_id from reprocessing_jobs order by 1")] == [2, 3, 5]


async def test_the_command(connection: asyncpg.Connection, database: str) -> None:
    await book(connection, trade("a", "BUY", 100, 200, 1), trade("b", "BUY", 50, 220, 3))
    moment = await connection.fetchval("select clock_timestamp()")
    await book(connection, trade("c", "SELL", 40, 215, 2))

    async def run(*arguments: str) -> Result:
        environment = {"TIDEMARK_DATABASE_URL": database, "TIDEMARK_BROKER_URL": "kafka://127.0.0.1:1"}
        return await asyncio.to_thread(CliRunner(env=environment).invoke, main, ["history", *arguments])

    async def rows(*arguments: str) -> list[Any]:
        result = await run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    assert [row["transaction_id"] for row in await rows("P", "S")] == ["a", "c", "b"]
    assert [row["quantity"] for row in await rows("P", "S", "--known-at", moment.isoformat())] == [100, 150]
    assert [row["quantity"] for row in await rows("P", "S", "--epoch", "0")] == [100, 150]
    assert [row["quantity"] for row in await rows("P", "S", "--as-of", "2025-01-02")] == [60]
    assert [row["change"] for row in await rows("P", "S", "--diff", "0", "1")] == ["added", "changed"]
    assert await rows("P", "S", "--as-of", "2024-01-02") == []
    shown = await run("P", "S", "--diff", "0", "1")
    assert "added" in shown.output
    assert "new_quantity" in shown.output
    for arguments, message in {
        ("P", "X"): "portfolio P has never held X",
        ("P", "S", "--epoch", "7"): "there is no epoch 7: the epochs of this key are 0 to 1",
        ("P", "S", "--known-at", "yesterday"): "not an ISO 8601 timestamp",
        ("P", "S", "--epoch", "0", "--diff", "0", "1"): "exclude each other",
    }.items():
        result = await run(*arguments)
        assert result.exit_code != 0
        assert message in result.output


async def test_a_move_happens_at_one_moment_on_both_keys(
    connection: asyncpg.Connection,
) -> None:
    """A move changes two keys at one moment: no time finds it on both, or on none."""
    await book(connection, trade("a", "BUY", 100, 10, 6), trade("b", "BUY", 1, 10, 5, portfolio="Q"))
    await book(connection, trade("a", "BUY", 100, 10, 6, revision=1, portfolio="Q"))
    moments = [row[0] for row in await connection.fetch(
        "select recorded_at from position_history union select superseded_at from position_history"
        " where superseded_at is not null")]  # fmt: skip
    for moment in moments:
        for near in (moment - timedelta(microseconds=1), moment):
            rows = await known(connection, "position_as_of", date(2025, 1, 31), near)
            assert sum(row[6] for row in rows) in (0, 101)
