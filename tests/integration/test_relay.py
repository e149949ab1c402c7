"""The relay on a real Kafka and Postgres: order through changes of leader, messages refused, a broker that is away."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from click.testing import CliRunner

from deploy.examples.cash_flows import CashFlows, follow
from deploy.local.part import Part
from deploy.local.ports import Ports
from deploy.local.stack import Stack
from sinks import outbox
from sinks.database import connect
from streams.settings import Settings
from streams.topics import ensure_topics
from tests import processed, scenarios
from tests.reading import read_all
from tests.relays import relays
from tests.topology import run_topology, settings_for
from tidemark.main import main

TOPIC = "transactions-processed"
_SECONDS = 120.0


@pytest.fixture
async def settings(kafka: str, database: str, folder: Path) -> Settings:
    settings = settings_for(kafka, database, folder)
    await ensure_topics(settings)
    return settings


async def write(pool: asyncpg.Pool, key: str, *values: bytes, topic: str = TOPIC) -> list[int]:
    rows = await pool.fetch(
        "insert into outbox_events (topic, message_key, value) select $1, $2, unnest($3::bytea[]) returning id",
        topic, key.encode(), list(values),
    )  # fmt: skip
    return [row["id"] for row in rows]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(_SECONDS):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def published(settings: Settings, topic: str = TOPIC) -> dict[bytes, list[tuple[int, bytes]]]:
    """(event_id, value) by message key, in order of offset, all that is there."""
    found: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
    messages, _ = await read_all(settings, topic)
    for message in messages:
        found[message.key].append((int(dict(message.headers)["event_id"]), message.value))
    return found


def unpassed(messages: list[tuple[int, bytes]]) -> list[int]:
    """The ids that a consumer takes which ignores those it has passed."""
    taken: list[int] = []
    for id_, _ in messages:
        if not taken or id_ > taken[-1]:
            taken.append(id_)
    return taken


async def end_leader(pool: asyncpg.Pool) -> int:
    """End the session of the relay that leads, once one does; returns its process id."""
    ended: list[int] = []

    async def found() -> bool:
        rows = await pool.fetch(
            "select pid, pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted"
            f" and objid = {outbox._LEADER_LOCK}"
            " and database = (select oid from pg_database where datname = current_database())"
        )
        ended.extend(row["pid"] for row in rows)
        return bool(ended)

    await until(found)
    return ended[0]


async def test_order_per_key_survives_every_change_of_leader(settings: Settings, pool: asyncpg.Pool) -> None:
    """Three relays; the leader's session is ended again and again while rows come in."""
    chance = random.Random(1)
    written: dict[bytes, list[int]] = defaultdict(list)
    leaders: set[int] = set()
    async with relays(settings, 3):
        for _ in range(60):
            for _ in range(20):
                key = f"K{chance.randrange(7)}"
                written[key.encode()] += await write(pool, key, *(b"x" * chance.randrange(1, 400) for _ in range(9)))
            if chance.random() < 0.3:
                leaders.add(await end_leader(pool))
        await until(lambda: _empty(pool))
    messages = await published(settings)
    assert {key: unpassed(of_key) for key, of_key in messages.items()} == written
    assert len(leaders) >= 5


async def _empty(pool: asyncpg.Pool) -> bool:
    return not await pool.fetchval("select count(*) from outbox_events")


async def test_a_silent_leader_is_succeeded(settings: Settings, pool: asyncpg.Pool, database: str) -> None:
    frozen = await connect(database)
    await frozen.execute("select pg_advisory_lock($1)", outbox._LEADER_LOCK)
    async with relays(settings, silent_seconds=1):
        await write(pool, "K", b"1")
        await until(lambda: _empty(pool))
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await frozen.fetchval("select 1")
    with suppress(Exception):
        await frozen.close()


async def test_a_row_that_cannot_be_published_holds_back_its_key_alone(
    settings: Settings, pool: asyncpg.Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """Until the topic takes it and an operator says so; then its key goes on in order."""
    before = await write(pool, "BAD", b"1")
    poison = await write(pool, "BAD", b"x" * 3_000_000)
    behind = await write(pool, "BAD", *[b"2"] * 30)
    others = {f"K{n}": await write(pool, f"K{n}", *[b"3"] * 20) for n in range(8)}
    async with relays(settings):

        async def waiting() -> list[int]:
            return [row[0] for row in await pool.fetch("select id from outbox_events where held_at is null")]

        await until(lambda: _nothing(waiting))
        behind += await write(pool, "BAD", b"4")  # what comes later must not pass
        later = await write(pool, "K0", b"5")
        await until(lambda: _nothing(waiting))
        messages = await published(settings)
        assert unpassed(messages.pop(b"BAD")) == before
        assert {key.decode(): unpassed(of_key) for key, of_key in messages.items()} == {
            **others, "K0": others["K0"] + later
        }  # fmt: skip
        rows = await pool.fetch("select id from outbox_events where failure_reason is not null")
        assert [row["id"] for row in rows] == poison
        async with pool.acquire() as connection:
            backlog = await outbox.backlog(connection)
        assert (backlog.pending, backlog.held) == (1 + len(behind), 1 + len(behind))
        assert "its key is held back" in caplog.text
        await _set_topic(settings, "max.message.bytes", "4000000")
        environment = {"TIDEMARK_DATABASE_URL": settings.dsn, "TIDEMARK_BROKER_URL": settings.broker}
        shown = await asyncio.to_thread(CliRunner(env=environment).invoke, main, ["outbox", "--retry", "--json"])
        assert [row["id"] for row in json.loads(shown.output)["refused"]] == poison
        await until(lambda: _empty(pool))
    assert unpassed((await published(settings))[b"BAD"]) == before + poison + behind


async def _nothing(waiting: Callable[[], Any]) -> bool:
    return not await waiting()


async def _set_topic(settings: Settings, name: str, value: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, settings.topic(TOPIC), {name: value})
        await admin.alter_configs([resource])
    finally:
        await admin.close()


async def test_small_limits_refuse_batches_but_no_message(settings: Settings, pool: asyncpg.Pool) -> None:
    """A batch that the topic refuses as a whole is sent message by message."""
    await _set_topic(settings, "max.message.bytes", "600")
    written = {f"K{n}": await write(pool, f"K{n}", *[b"x" * 200] * 8) for n in range(3)}
    async with relays(settings):
        await until(lambda: _empty(pool))
    messages = await published(settings)
    assert {key.decode(): [id_ for id_, _ in of_key] for key, of_key in messages.items()} == written


async def test_the_outbox_grows_while_the_broker_is_away(settings: Settings, pool: asyncpg.Pool, folder: Path) -> None:
    port = Ports(folder / "ports-nobody.json").choose("nobody")
    nobody = settings.model_copy(update={"broker_url": f"kafka://127.0.0.1:{port}"})
    nobody.__dict__.pop("bootstrap_servers", None)
    ids: list[int] = []
    async with relays(nobody):
        for _ in range(20):
            ids += await write(pool, "K", b"1", b"2")
            await asyncio.sleep(0.05)
        assert await pool.fetchval("select count(*) from outbox_events") == len(ids) == 40
    async with relays(settings):
        await until(lambda: _empty(pool))
    assert unpassed((await published(settings))[b"K"]) == ids


async def _killed(worker: Part) -> bool:
    """Whether there was a process to kill: it may have been killed just before."""
    if pid := worker.pid:
        os.kill(pid, signal.SIGKILL)
    return pid is not None


async def test_the_example_keeps_right_totals_through_corrections(
    kafka: str, empty_database: str, folder: Path
) -> None:
    """One consumer from the start, one that joins when all is over; replays are expanded by the relay."""
    events = scenarios.generate(11, events=1_200)
    expected = scenarios.expected_books(events)
    async with run_topology(kafka, empty_database, folder, replay_rows=3) as topology:
        servers, topic = topology.settings.bootstrap_servers, topology.settings.topic(TOPIC)
        live, late = CashFlows(), CashFlows()
        following = [asyncio.create_task(follow(servers, live, topic))]
        for first in range(0, len(events), 150):
            await topology.send(events[first : first + 150])
            await topology.settle()
        following.append(asyncio.create_task(follow(servers, late, topic)))
        rows = await topology.pool.fetch(
            """
            select h.portfolio_id, h.security_id, s.epoch, array_agg(t.transaction_id order by h.sequence) as ids,
                   sum(case when transaction_type in ('BUY', 'FEE', 'TAX') then -gross_transaction_amount - trade_fee
                            when transaction_type in ('SELL', 'DIVIDEND', 'INTEREST')
                            then gross_transaction_amount - trade_fee else 0 end) as net_cash
            from position_history h join transactions t using (transaction_id)
            join position_state s on s.portfolio_id = h.portfolio_id and s.security_id = h.security_id
            where superseded_epoch is null group by 1, 2, 3
            """
        )
        wanted = {(row[0], row[1]): (row["epoch"], row["ids"], row["net_cash"]) for row in rows}

        def has(flows: CashFlows) -> dict[tuple[str, str], tuple[Any, ...]]:
            found = flows.holdings.items()
            return {key: (h.epoch, h.transactions, h.net_cash) for key, h in found if h.transactions}

        async def both() -> bool:
            done = [task for task in following if task.done()]
            assert not done, done
            return has(live) == has(late) == wanted

        try:
            await until(both)
        except TimeoutError:
            assert has(live) == wanted
            assert has(late) == wanted
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
        assert len(wanted) == len(expected.history)
        assert max(epoch for epoch, _, _ in wanted.values()) > 5
        assert json.dumps(sorted(wanted)) == json.dumps(sorted(expected.history))


async def test_a_consumer_from_any_offset_has_the_live_transactions_under_faults(
    kafka: str, empty_database: str, folder: Path
) -> None:
    """Two `books` workers, one of which is killed again and again, and leaders whose sessions are ended."""
    chance = random.Random(7)
    events = scenarios.generate(21, events=1_000)
    async with run_topology(kafka, empty_database, folder, replay_rows=5) as topology:
        spare = Stack(topology.settings.model_copy(update={"data_dir": folder / "spare-books"}), roles=["books"])
        await spare.start()
        killed = ended = 0
        try:
            for first in range(0, len(events), 80):
                await topology.send(events[first : first + 80])
                if chance.random() < 0.4:
                    await until(lambda: _killed(spare.workers["books"]))
                    killed += 1
                else:
                    await end_leader(topology.pool)
                    ended += 1
                await asyncio.sleep(chance.random())
            await topology.settle()
            assert min(killed, ended) > 2
            wrong, compared = await processed.check(topology.settings, topology.pool, chance)
            assert wrong == []
            assert compared > 100
        finally:
            await spare.stop()
