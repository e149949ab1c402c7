"""A whole topology for tests: real workers on the run's Kafka and Postgres, under a topic prefix of its own."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer as ConfluentProducer

from deploy.local.stack import Stack
from sinks.database import connect_pool
from streams.settings import ROLES, Settings, load_named
from streams.topics import all_topics
from tests.reading import read_all
from tidemark.audit import AuditResult, audit_books

Event = tuple[str, Any]
Key = Callable[[dict[str, Any]], bytes | None]
_STILL_SECONDS = 120.0

_PENDING = """
select (select count(*) from dirty_keys) as dirty_keys,
       (select count(*) from corrections where right_at is null) as corrections,
       (select count(*) from reprocessing_jobs where status in ('PENDING', 'PROCESSING')) as jobs,
       (select count(*) from outbox_events) as outbox,
       (select coalesce(sum(next_offset), 0) from kafka_offsets where consumer_group like '%intake') as consumed
"""


def by_security(record: dict[str, Any]) -> bytes | None:
    """The key most producers use."""
    return record["security_id"].encode() if "security_id" in record else None


def unkeyed(record: dict[str, Any]) -> bytes | None:
    """No key: records go anywhere."""
    return None


class Topology:
    """What a test does with the topology: send, wait until the books are right, look. sent: records sent before."""

    def __init__(self, stack: Stack, pool: asyncpg.Pool, sent: int = 0) -> None:
        self.stack = stack
        self.settings: Settings = stack.settings
        self.pool = pool
        self._sent = sent

    def count_sent(self, records: int) -> None:
        """So many have been sent to the input topics in some other way."""
        self._sent += records

    async def send(self, events: Sequence[Event], key: Key = by_security) -> None:
        """With aiokafka (murmur2). A bytes or None event is sent as it is."""
        producer = AIOKafkaProducer(bootstrap_servers=self.settings.bootstrap_servers, max_request_size=2**21)
        await producer.start()
        try:
            for topic, record in events:
                raw = record is None or isinstance(record, bytes)
                value = record if raw else json.dumps(record).encode()
                await producer.send(self.settings.topic(topic), value, key=b"raw" if raw else key(record))
        finally:
            await producer.stop()  # flushes
        self._sent += len(events)

    def send_with_librdkafka(self, events: Sequence[Event], key: Key = by_security) -> None:
        """With confluent-kafka, whose default partitioner is another one (CRC32)."""
        failed: list[Any] = []
        producer = ConfluentProducer(
            {"bootstrap.servers": self.settings.bootstrap_servers, "linger.ms": 5, "enable.idempotence": True}
        )
        for topic, record in events:
            producer.produce(
                self.settings.topic(topic),
                json.dumps(record).encode(),
                key=key(record),
                on_delivery=lambda error, _: error and failed.append(error),
            )
            producer.poll(0)
        assert producer.flush(30) == 0
        assert failed == []
        self._sent += len(events)

    async def settle(self) -> None:
        """Until every record sent is consumed and nothing is left to be done. Fails with what is left."""
        last: dict[str, int] = {}
        try:
            async with asyncio.timeout(_STILL_SECONDS):
                while True:
                    last = dict(await self.pool.fetchrow(_PENDING))
                    last["consumed"] -= self._sent
                    if not any(last.values()):
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"still waiting after {_STILL_SECONDS} s: {last}") from None

    async def audit(self) -> AuditResult:
        """The books against the oracle, from the tables' own inputs."""
        return await audit_books(self.settings.dsn, self.settings.cost_basis_method)

    async def read(self, topic: str) -> list[Any]:
        """All records of a topic."""
        found, _ = await read_all(self.settings, topic)
        return found


async def draw(dsn: str) -> None:
    """Have the ledger draw many numbers, so that triggers may be sent which it has not issued."""
    async with await connect_pool(dsn, size=1) as pool:
        await pool.fetchval("select setval('correction_seq', 10_000_000)")


def settings_for(broker_url: str, database_url: str, folder: Path, **changes: Any) -> Settings:
    """A topology's settings: small, and under a prefix of its own unless one is given."""
    prefix = changes.pop("topic_prefix", None) or f"t{uuid.uuid4().hex[:8]}-"
    return load_named(
        broker_url=broker_url,
        database_url=database_url,
        topic_prefix=prefix,
        **{
            "data_dir": folder / prefix,
            "internal_partitions": 2,
            "input_partitions": 2,
            "session_timeout_seconds": 6,
            **changes,
        },
    )


def partitions(settings: Settings) -> dict[str, int]:
    """How many each topic is created with, by its full name."""
    return {topic.name: topic.partitions for topic in all_topics(settings)}


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = _STILL_SECONDS) -> None:
    """Wait for a condition; fails with what did not come."""
    try:
        async with asyncio.timeout(seconds):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not after {seconds:.0f} s: {what}") from None


@asynccontextmanager
async def run_topology(
    broker_url: str, database_url: str, folder: Path, roles: Sequence[str] = ROLES, **changes: Any
) -> AsyncIterator[Topology]:
    """Start the roles; afterwards no worker may have died meanwhile. changes: settings."""
    async with run_stack(settings_for(broker_url, database_url, folder, **changes), roles) as topology:
        yield topology


@asynccontextmanager
async def run_stack(
    settings: Settings, roles: Sequence[str] = ROLES, *, sent: int = 0, may_restart: bool = False
) -> AsyncIterator[Topology]:
    """The same with settings at hand. sent: how many records were sent before; may_restart: workers may die."""
    stack = Stack(settings, roles=roles)
    await stack.start()
    pool = await connect_pool(stack.settings.dsn, size=2)
    try:
        yield Topology(stack, pool, sent)
        assert may_restart or stack.restarts == 0, f"a worker died: see {settings.data_dir / 'logs'}"
    finally:
        await pool.close()
        await stack.stop()
