"""Confirming a database on a real Kafka and Postgres: fences, two databases at once, a worker that dies halfway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner

from deploy.local.postgres import PostgresServer
from sinks import generation, reannounce
from sinks.database import connect, connect_pool
from sinks.generation import Mark
from sinks.outbox import OutboxEvent
from streams import confirm as confirming
from streams.confirm import confirm
from streams.relay import Publisher
from streams.settings import Settings
from streams.topics import ensure_topics
from tests.reading import read_all
from tests.relays import relays
from tests.topology import settings_for, until
from tidemark.main import main

TOPIC = "transactions-processed"


@pytest.fixture
async def settings(kafka: str, database: str, folder: Path) -> Settings:
    settings = settings_for(kafka, database, folder, internal_partitions=1)
    await ensure_topics(settings)
    return settings


@asynccontextmanager
async def copied(postgres: PostgresServer, settings: Settings) -> AsyncIterator[tuple[Settings, asyncpg.Pool]]:
    """A copy of the database as it is now, which nobody has confirmed."""
    name = settings.dsn.rsplit("/", 1)[1]
    copy = f"{name}_copy"
    server = await connect(postgres.url("postgres"))
    try:
        await server.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
        await server.execute(f"create database {copy} template {name}")
        changed = settings.model_copy(update={"database_url": type(settings.database_url)(postgres.url(copy))})
        async with await connect_pool(changed.dsn) as pool:
            yield changed, pool
    finally:
        await server.execute(f"drop database if exists {copy} with (force)")
        await server.close()


async def publish(pool: asyncpg.Pool, *values: bytes) -> None:
    """Have the relay that runs publish messages."""
    await pool.fetch("insert into outbox_events (topic, message_key, value) select $1, 'k', unnest($2::bytea[])",
                     TOPIC, list(values))  # fmt: skip

    async def is_empty() -> bool:
        return await pool.fetchval("select count(*) from outbox_events") == 0

    await until(is_empty, "an empty outbox", 30)


async def published(settings: Settings) -> list[bytes]:
    log, _ = await read_all(settings, TOPIC)
    return [message.value for message in log]


async def close_gate(pool: asyncpg.Pool) -> None:
    await pool.execute("update installation set instance = null")


async def test_a_database_that_knows_what_was_published_goes_on(settings: Settings, pool: asyncpg.Pool) -> None:
    async with relays(settings):
        await publish(pool, b"1")
    await close_gate(pool)
    found = await confirm(settings, reannounces=False)
    assert found.outcome == "confirmed"
    assert (await confirm(settings, reannounces=False)).outcome == "open"
    async with relays(settings):
        await publish(pool, b"2")
    assert await published(settings) == [b"1", b"2"]
    assert await pool.fetchval("select generation from installation") == 0


async def test_of_two_databases_only_the_one_confirmed_last_publishes(
    settings: Settings, pool: asyncpg.Pool, postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The former primary still takes writes; its relay is in the middle of its work."""
    await close_gate(pool)
    assert (await confirm(settings, reannounces=True)).outcome == "confirmed"
    async with copied(postgres, settings) as (other, of_other):
        async with relays(settings):
            await publish(pool, b"before")
            # The copy lacks the round, so it is another generation; from here on the first one is to be silent.
            assert (await confirm(other, reannounces=True)).outcome == "new generation"
            await pool.execute(
                f"insert into outbox_events (topic, message_key, value) values ('{TOPIC}', 'k', 'after')"
            )
            await until(lambda: _said(caplog, "another database has been confirmed"), "a relay that gives way", 60)
        async with relays(other):
            await publish(of_other, b"other")
    assert await published(settings) == [b"before", b"other"]


async def test_a_database_that_goes_back_under_a_running_server_is_found_out(
    settings: Settings, pool: asyncpg.Pool
) -> None:
    """As by the snapshot of a whole machine: the server's process is the same, so the gate stays open."""
    async with relays(settings):
        await publish(pool, b"1")
        await publish(pool, b"2")
    await pool.execute("delete from relay_rounds")
    async with relays(settings):
        await until(lambda: _is_closed(pool), "a closed gate", 30)
    assert (await confirm(settings, reannounces=True)).outcome == "new generation"
    async with relays(settings):
        await publish(pool, b"3")


async def test_a_worker_that_dies_while_it_begins_a_generation_leaves_nothing_behind(
    settings: Settings, pool: asyncpg.Pool, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with copied(postgres, settings) as (other, of_other):
        async with await connect_pool(settings.dsn, size=1) as first, relays(settings):
            await publish(first, b'{"portfolio_id": "P", "security_id": "A", "epoch": 3, "sequence": 0, "count": 0}')

        async def die(*_: object) -> None:
            raise ConnectionResetError("gone")

        with monkeypatch.context() as patched:
            patched.setattr(reannounce, "_announce", die)
            with pytest.raises(ConnectionResetError):
                await confirm(other, reannounces=True)
        assert await _is_closed(of_other)
        assert await of_other.fetchval("select count(*) from generations") == 0
        assert (await confirm(other, reannounces=False)).outcome == "lost"
        assert (await confirm(other, reannounces=True)).outcome == "new generation"
        assert await of_other.fetchval("select epoch from position_state") == 1 << reannounce.EPOCHS_BITS


async def test_a_relay_that_has_not_finished_is_waited_for(
    settings: Settings, pool: asyncpg.Pool, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it still publishes behind the fence is announced anew too."""
    position = b'{"portfolio_id": "LATE", "security_id": "A", "epoch": 3, "sequence": 0, "count": 0}'
    async with copied(postgres, settings) as (other, of_other):
        fenced, marked = asyncio.Event(), asyncio.Event()
        set_fence, lanes = confirming.set_fence, Publisher._lanes

        async def announced(of: Settings, instance: str, last: Mark | None) -> int:
            offset = await set_fence(of, instance, last)
            fenced.set()
            return offset

        async def slowly(publisher: Publisher, events: Sequence[OutboxEvent]) -> object:
            marked.set()
            await fenced.wait()
            return await lanes(publisher, events)

        monkeypatch.setattr(confirming, "set_fence", announced)
        monkeypatch.setattr(Publisher, "_lanes", slowly)
        async with await connect_pool(settings.dsn, size=1) as first, relays(settings):
            await first.execute(f"insert into outbox_events (topic, message_key, value) values ('{TOPIC}', 'k', $1)",
                                position)  # fmt: skip
            await marked.wait()
            assert (await confirm(other, reannounces=True)).outcome == "new generation"
        assert await of_other.fetchval("select portfolio_id from position_state") == "LATE"


async def test_a_command_that_writes_has_the_database_confirmed(settings: Settings, pool: asyncpg.Pool) -> None:
    await pool.execute("insert into business_dates values ('2025-01-02')")
    await pool.execute("insert into securities values ('A')")
    await close_gate(pool)
    done = await asyncio.to_thread(
        CliRunner().invoke, main, ["reprocess", "--security", "A", "2025-01-02", "--actor", "me"],
        env=settings.environment(),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not await _is_closed(pool)


async def _is_closed(pool: asyncpg.Pool) -> bool:
    async with pool.acquire() as connection:
        return not (await generation.read(connection)).is_open


async def _said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text
