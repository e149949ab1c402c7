"""The relay: messages per second, queued and expanded, beside a bare producer; latency from commit to consumer."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from decimal import Decimal

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from sinks import outbox, positions
from sinks.database import connect_pool
from streams.settings import Settings
from streams.topics import PROCESSED
from tests.bench.bench_positions import trade
from tests.bench.harness import Bench, Result, percentile, timed
from tests.relays import relays

_WAIT_SECONDS = 120.0


async def run(bench: Bench) -> None:
    """Throughput of queued rows and of a replay, and idle latency."""
    async with bench.database() as dsn:
        settings = await bench.settings(dsn)
        pool = await connect_pool(dsn)
        try:
            await _throughput(bench, settings, pool)
            await _replay(bench, settings, pool)
            await _latency(bench, settings, pool)
        finally:
            await pool.close()


async def drained(pool: asyncpg.Pool) -> None:
    async with asyncio.timeout(_WAIT_SECONDS):
        while await pool.fetchval("select exists (select from outbox_events)"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def produce(settings: Settings, messages: Sequence[tuple[bytes, bytes]]) -> float:
    """Seconds a bare producer takes, acks from all, all messages at hand."""
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, acks="all", linger_ms=2, max_batch_size=512 * 1024
    )
    await producer.start()
    try:
        await producer.send_and_wait(settings.topic(PROCESSED), b"{}", key=b"first")

        async def all_of_them() -> None:
            topic = settings.topic(PROCESSED)
            futures = [
                await producer.send(topic, value, key=key, headers=[("event_id", b"1234567")])
                for key, value in messages
            ]
            await asyncio.gather(*futures)

        return await timed(all_of_them())
    finally:
        await producer.stop()


def _messages(count: int) -> list[tuple[bytes, bytes]]:
    event = {
        "portfolio_id": "P1", "security_id": "S1", "epoch": 1, "sequence": 1, "transaction_id": "t1", "quantity": 5,
        "transaction_date": "2025-01-01T10:00:00.000000Z", "transaction_type": "BUY", "price": 10, "trade_fee": 0,
        "gross_transaction_amount": 50, "currency": "USD", "revision": 0, "cancelled": False, "replayed": True,
    }  # fmt: skip
    return [(f"P{n % 1_000}|S{n % 100}".encode(), json.dumps(event).encode()) for n in range(count)]


async def _throughput(bench: Bench, settings: Settings, pool: asyncpg.Pool) -> None:
    messages = _messages(bench.size(40_000, 10_000))

    async def relayed() -> float:
        async with relays(settings):
            await outbox_ready(pool)
            await pool.execute(
                "insert into outbox_events (topic, message_key, value)"
                " select $1, key, value from unnest($2::bytea[], $3::bytea[]) as e (key, value)",
                PROCESSED, [key for key, _ in messages], [value for _, value in messages],
            )  # fmt: skip
            await outbox.wake(pool)
            return len(messages) / await timed(drained(pool))

    async def bare() -> float:
        return len(messages) / await produce(settings, messages)

    await bench.compare("relay, queued rows", "messages/s", relayed, ("bare producer", bare), wanted=0.5)


async def outbox_ready(pool: asyncpg.Pool) -> None:
    """A first message through, so that the relay leads and knows the topic."""
    await pool.execute(
        "insert into outbox_events (topic, message_key, value) values ($1, $2, $3)", PROCESSED, b"first", b"{}"
    )
    await drained(pool)


async def _replay(bench: Bench, settings: Settings, pool: asyncpg.Pool) -> None:
    """The last transaction of a long history amended: one row in the outbox, expanded until the last is published."""
    length = bench.size(40_000, 10_000)
    revision = 0
    async with pool.acquire() as connection:
        for first in range(0, length, 10_000):
            async with connection.transaction():
                batch = [trade(n, 9) for n in range(first, first + 10_000)]
                await positions.apply(connection, list(enumerate(batch)), "FIFO")
        await connection.execute("delete from outbox_events")

    async def expanded() -> float:
        nonlocal revision
        revision += 1
        async with relays(settings):
            await outbox_ready(pool)
            last = trade(length - 1, 9)
            amended = msgspec.structs.replace(last, revision=revision, gross_transaction_amount=Decimal(revision))
            async with pool.acquire() as connection, connection.transaction():
                await positions.apply(connection, [(0, amended)], "FIFO", 0)
            await outbox.wake(pool)
            return length / await timed(drained(pool))

    async def bare() -> float:
        return length / await produce(settings, [(b"P9|S9", value) for _, value in _messages(length)])

    await bench.compare("relay, a long replay of one key", "messages/s", expanded, ("bare producer", bare), wanted=0.5)


async def _latency(bench: Bench, settings: Settings, pool: asyncpg.Pool) -> None:
    """From COMMIT to a consumer's hands, one message at a time, hint included as the workers send it."""
    count = bench.size(300, 60)
    consumer = AIOKafkaConsumer(
        settings.topic(PROCESSED), bootstrap_servers=settings.bootstrap_servers, auto_offset_reset="latest"
    )
    await consumer.start()
    p50s, p99s = [], []
    try:
        async with relays(settings):
            await outbox_ready(pool)
            for number in range(bench.rounds):
                bench.say(f"relay, idle latency: round {number + 1} of {bench.rounds}")
                await _one(consumer, pool, f"{number}-first".encode())  # the relay may be on its way to lead
                figures = [await _one(consumer, pool, f"{number}-{n}".encode()) for n in range(count)]
                p50s.append(statistics.median(figures))
                p99s.append(percentile(99, figures))
    finally:
        await consumer.stop()
    bench.add(Result("relay, idle: commit to consumer, p99", "ms", p99s, wanted=50, less=True))
    bench.add(Result("relay, idle: commit to consumer, p50", "ms", p50s, less=True))


async def _one(consumer: AIOKafkaConsumer, pool: asyncpg.Pool, value: bytes) -> float:
    await asyncio.sleep(0.01)
    await pool.execute(
        "insert into outbox_events (topic, message_key, value) values ($1, $2, $3)", PROCESSED, b"K", value
    )
    committed = time.perf_counter()
    await outbox.wake(pool)
    async with asyncio.timeout(_WAIT_SECONDS):
        while (await consumer.getone()).value != value:
            pass
    return (time.perf_counter() - committed) * 1_000
