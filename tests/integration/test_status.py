"""`tidemark status` tells the state of the books wherever database and broker are named, without a stack too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from sinks import operations, roster
from sinks.database import Pool
from streams.settings import ROLES, load_named
from streams.topics import ensure_topics
from tests.engine import Engine
from tests.integration.test_books_sql import dates, price, trade
from tidemark.main import main


async def run(tmp_path: Path, *arguments: str, **settings: str) -> Result:
    environment = {
        "TIDEMARK_DATA_DIR": str(tmp_path),
        **{f"TIDEMARK_{name}": value for name, value in settings.items()},
    }
    return await asyncio.to_thread(CliRunner().invoke, main, ["status", *arguments], env=environment)


async def report(pool: Pool, *roles: str) -> None:
    async with pool.acquire() as connection:
        for role in roles:
            await roster.report(connection, roster.Report(uuid4(), role, "h", 7, f"http://{role}", None, [], 0, 0, 0))


async def test_the_state_of_the_books_is_told_from_anywhere(kafka: str, database: str, tmp_path: Path) -> None:
    prefix = f"s{uuid4().hex[:6]}-"
    await ensure_topics(load_named(broker_url=kafka, topic_prefix=prefix, input_partitions=1, internal_partitions=1))
    named = {"DATABASE_URL": database, "BROKER_URL": kafka, "TOPIC_PREFIX": prefix, "INPUT_PARTITIONS": "1",
             "INTERNAL_PARTITIONS": "1"}  # fmt: skip
    engine = await Engine.on(database)
    pool = engine.pool
    try:
        await engine.take("prices", [price(1, 100)])
        await engine.take("transactions", [trade(f"t{n}", "BUY", 10, 100, 1, f"P{n}") for n in range(3)])
        await engine.take("business-dates", dates(1, 2, 3))
        await engine.drain()
        await report(pool, "intake", "triggers")
        found = await run(tmp_path, **named)
        assert found.exit_code == 1, "two roles have no worker"
        assert "final up to 2025-01-03" in found.output
        await report(pool, "resets", "books")
        await engine.take("prices", [price(2, 90)])
        await engine.relay()
        await engine.open_jobs()
        async with pool.acquire() as connection:
            await operations.throttle(connection, "ann", 250)
            await operations.cancel_job(connection, "ann", engine.running.pop().job_id)
        found = await run(tmp_path, **named)
        assert found.exit_code == 0, found.output
        lines = dict(line.split(maxsplit=1) for line in found.output.splitlines())
        assert (
            lines["state"] == "2025-01-03 is the latest closed date; 3 keys provisional, 6 snapshots to value at most"
        )
        assert lines["corrections"] == "1 open; 1 held; 0 securities wait for a reset"
        assert found.output.splitlines()[2].split(maxsplit=2) == ["reset", "rate", "250 keys per second"]
        assert lines["lag"] == "nothing is behind"
        assert lines["audit"].startswith("no full pass yet")
        assert lines["triggers"] == "pid 7  http://triggers  ready"
        shown: dict[str, Any] = json.loads((await run(tmp_path, "--json", **named)).output)
        assert database not in json.dumps(shown), "it may hold a password"
        assert (shown["ready"], {each["role"] for each in shown["workers"]}) == (True, set(ROLES))
        books = shown["books"]
        assert (books["right"], books["dirty_keys"], books["corrections_held"], books["lag_records"]) == (
            False,
            3,
            1,
            0,
        )
    finally:
        await pool.close()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
async def test_what_keeps_it_from_being_told_is_one_line(
    empty_database: str, tmp_path: Path, arguments: list[str]
) -> None:
    broker = "kafka://127.0.0.1:1"
    for url, says in ((empty_database, "tidemark migrate"), ("postgresql://x@127.0.0.1:1/none", "database")):
        found = await run(tmp_path, *arguments, DATABASE_URL=url, BROKER_URL=broker)
        assert (found.exit_code, found.output.count("\n"), says in found.output) == (1, 1, True), found.output


async def test_a_broker_that_is_away_does_not_keep_the_books_from_being_told(database: str, tmp_path: Path) -> None:
    found = await run(tmp_path, DATABASE_URL=database, BROKER_URL="kafka://127.0.0.1:1")
    assert "the broker does not answer" in found.output
    assert "no date is closed" in found.output
