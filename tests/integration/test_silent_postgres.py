"""Postgres goes silent in the middle: nothing closes, nothing answers. Each kind of session gives up and goes on."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import asyncpg
import pytest
from asyncpg.protocol import Protocol

from sinks import session
from sinks.batches import Batch, Record
from sinks.database import Connection, Pool, connect, connect_pool, leadership
from sinks.offsets import Offsets
from sinks.session import Address
from sinks.valuation import Valuation
from streams.relay import Relay
from streams.settings import load_named
from streams.topics import ensure_topics
from tests.chaos.proxy import Proxy
from tests.engine import Engine
from tests.integration.test_offsets import Sent
from tests.reading import read_all
from tests.topology import until

ANSWER_SECONDS = 2.0
_GIVES_UP_SECONDS = 30.0
TP = ("prices", 0)
T = TypeVar("T")


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    port = urlsplit(database).port
    assert port is not None
    started = Proxy(lambda: port)
    await started.start()
    yield started
    await started.close()


@pytest.fixture
async def address(database: str, proxy: Proxy) -> Address:
    """The database by way of the proxy."""
    return Address(database.replace(f":{urlsplit(database).port}/", f":{proxy.port}/"), ANSWER_SECONDS)


@pytest.fixture
async def through(address: Address) -> AsyncIterator[Pool]:
    """A worker's sessions by way of the proxy."""
    opened = await connect_pool(address, size=8, name="tidemark-intake")
    yield opened
    opened.terminate()


def offsets(pool: Pool) -> Offsets:
    async def get() -> Pool:
        return pool

    return Offsets(get, "group", lambda: False)


async def refuse(connection: Connection, record: Record, detail: str) -> None:
    raise AssertionError(detail)


async def in_time(work: Awaitable[T]) -> T:
    async with asyncio.timeout(_GIVES_UP_SECONDS) as limit:
        done = await work
    assert not limit.expired(), "it went on only because it was cancelled"
    return done


def test_every_statement_passes_what_the_watch_watches() -> None:
    """asyncpg's protocol has no other way to ask Postgres for something."""
    asks = {name for name in dir(Protocol) if inspect.iscoroutinefunction(getattr(Protocol, name)) and name[0] != "_"}
    assert asks == {*session._ASKS, "close"}


async def test_a_sink_whose_statement_is_not_answered_does_its_batch_again(
    through: Pool, proxy: Proxy, pool: Pool
) -> None:
    """The lost session holds the offset's row on the server, which does not miss its client: it is ended there too."""
    await pool.execute("create table effects (record bigint)")
    one = offsets(through)
    claim = (await one.claim({TP: 0}))[TP]
    attempts = 0

    async def effect(connection: Connection, records: Sequence[Record]) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("insert into effects values (1)")
        if attempts == 1:
            await proxy.silence_all()
        await connection.execute("insert into effects values (2)")

    await in_time(one.apply(Batch(*TP, claim.epoch, 0, [Sent(0)]), effect, refuse))
    assert attempts == 2
    assert await pool.fetchval("select array_agg(record order by record) from effects") == [1, 2]
    assert await pool.fetchval("select next_offset from kafka_offsets") == 1
    open_ = "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in trans%'"
    assert await pool.fetchval(open_) == 0


@pytest.mark.parametrize("where", ["silent before COMMIT", "silent after COMMIT"])
async def test_a_commit_that_is_not_answered_is_read_back(through: Pool, proxy: Proxy, pool: Pool, where: str) -> None:
    await pool.execute("create table effects (record bigint)")
    one = offsets(through)
    claim = (await one.claim({TP: 0}))[TP]
    attempts = 0

    async def effect(connection: Connection, records: Sequence[Record]) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("insert into effects values (1)")
        if attempts == 1:
            proxy.plan(where)  # type: ignore[arg-type]

    await in_time(one.apply(Batch(*TP, claim.epoch, 0, [Sent(0)]), effect, refuse))
    assert await pool.fetchval("select count(*) from effects") == 1
    assert attempts == (1 if where == "silent after COMMIT" else 2)


async def test_a_statement_that_postgres_works_on_is_left_alone(address: Address, pool: Pool) -> None:
    """A long statement, a wait for a lock, a long rest in a transaction: each longer than an answer may take."""
    long = 2 * ANSWER_SECONDS
    await pool.execute("create table counted (number int); insert into counted values (1)")
    working, waiting, holding = [await connect(address) for _ in range(3)]
    try:
        held = holding.transaction()
        await held.start()
        await holding.execute("update counted set number = 2")
        lock = asyncio.create_task(waiting.execute("update counted set number = 3"))
        assert await working.fetchval("select 'done' from pg_sleep($1)", long) == "done"
        await asyncio.sleep(long / 4)
        await held.commit()
        await lock
        assert await pool.fetchval("select number from counted") == 3
        assert session.PATIENCE.age < 10 * long, "a long statement of its own is no standstill of the worker"
    finally:
        for each in (working, waiting, holding):
            await each.close()


async def test_an_answer_on_its_way_is_waited_for(address: Address, proxy: Proxy) -> None:
    """Postgres is done with a large answer long before a slow line has brought it."""
    connection = await connect(address)
    proxy.delay = 0.15  # for each 64 KiB
    try:
        assert len(await in_time(connection.fetchval("select repeat('x', 2000000)"))) == 2_000_000
    finally:
        proxy.delay = 0.0
        await connection.close()


async def test_the_kernel_watches_over_the_socket_too(address: Address) -> None:
    connection = await connect(address)
    try:
        opened = connection._transport.get_extra_info("socket")
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == ANSWER_SECONDS * 1000
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
    finally:
        await connection.close()


async def test_a_silent_session_is_released_and_closed_in_time(through: Pool, proxy: Proxy, address: Address) -> None:
    """A task that gave up waiting (a page, a check of readiness) leaves a statement that nobody can cancel."""
    other = await connect(address)
    await through.fetchval("select 1")
    await proxy.silence_all()
    proxy.is_silent = True

    async def look() -> None:
        async with asyncio.timeout(0.5):
            await through.fetchval("select 1")

    looked, _ = await in_time(asyncio.gather(look(), other.close(), return_exceptions=True))
    assert isinstance(looked, TimeoutError)
    proxy.is_silent = False
    assert await in_time(through.fetchval("select 1")) == 1


async def test_what_a_session_leaves_on_the_server_is_ended_once_new_sessions_pass(
    through: Pool, proxy: Proxy, pool: Pool
) -> None:
    """While none did, the session was given up on this side alone; the locks of its transaction are held by a ghost."""
    await pool.execute("create table effects (record bigint)")
    await pool.execute("insert into effects values (1)")
    with pytest.raises(Exception, match="clos"):  # noqa: PT012 - the transaction's end fails too
        async with through.acquire() as connection, connection.transaction():
            await connection.execute("update effects set record = 2")
            await proxy.silence_all()
            proxy.is_silent = True
            await in_time(connection.execute("select 1"))
    ghosts = "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in trans%'"
    assert await pool.fetchval(ghosts) == 1
    proxy.is_silent = False
    await in_time(pool.execute("update effects set record = 3"))


async def test_a_leader_that_hears_nothing_steps_down(address: Address, proxy: Proxy, database: str) -> None:
    """The observer's kind of session: its lock is free again, and its heir leads."""
    async with leadership(address, 4711) as connection:
        assert connection is not None
        await proxy.silence_all()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await in_time(connection.fetchval("select 1"))
    async with leadership(database, 4711) as heir:
        assert heir is not None


async def test_a_relay_that_hears_nothing_goes_on_from_a_new_session(
    kafka: str, address: Address, pool: Pool, proxy: Proxy, folder: Path
) -> None:
    prefix = f"s{uuid.uuid4().hex[:8]}-"
    settings = load_named(
        broker_url=kafka, database_url=str(address), database_timeout_seconds=ANSWER_SECONDS,
        data_dir=folder / prefix, topic_prefix=prefix, internal_partitions=1,
    )  # fmt: skip
    await ensure_topics(settings)
    stopping = False
    relaying = asyncio.create_task(Relay(settings, lambda: stopping).run())
    sent = 0

    async def publishes() -> None:
        nonlocal sent
        sent += 1
        await pool.execute(
            "insert into outbox_events (topic, message_key, value) values ('transactions-processed', 'k', $1)",
            json.dumps(sent).encode(),
        )
        await until(_is_empty(pool), "published", _GIVES_UP_SECONDS)

    try:
        await publishes()
        await proxy.silence_all()
        await publishes()
        found, _ = await read_all(settings, "transactions-processed")
        assert {int(message.value) for message in found} == {1, 2}
    finally:
        stopping = True
        await in_time(relaying)


def _is_empty(pool: Pool) -> Callable[[], Awaitable[bool]]:
    async def is_empty() -> bool:
        return (await pool.fetchval("select count(*) from outbox_events")) == 0

    return is_empty


async def test_a_valuation_whose_commit_is_not_answered_is_done_again(through: Pool, proxy: Proxy, pool: Pool) -> None:
    """It holds its keys' locks on the server, where nobody hears of its client."""
    engine = Engine(pool)
    await engine.take("business-dates", [{"business_date": "2025-01-06"}])
    await engine.take("prices", [{"security_id": "A", "price_date": "2025-01-06", "price": 3, "currency": "EUR"}])
    trade = {"transaction_id": "T", "portfolio_id": "P", "security_id": "A", "transaction_type": "BUY"}
    trade |= {"transaction_date": "2025-01-06T10:00:00Z", "quantity": 2, "price": 2, "trade_fee": 0, "currency": "EUR"}
    await engine.take("transactions", [trade])
    proxy.plan("silent before COMMIT")
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await in_time(Valuation(through, 1_000).pass_once())
    assert (await in_time(Valuation(through, 1_000).pass_once())).snapshots == 1
    assert await pool.fetchval("select market_value from daily_position_snapshots") == 6
