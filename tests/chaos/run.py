"""One chaos run: a seed, a load, faults while there is a backlog; then the books and the witness must be right."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from deploy.local.kafka import KafkaServer
from deploy.local.part import Part
from deploy.local.ports import Ports
from deploy.local.postgres import PostgresServer
from deploy.local.stack import Stack
from sinks.database import connect, is_transient, migrate
from streams.settings import load_named
from streams.topics import BUSINESS_DATES, PRICES, TRANSACTIONS
from tests import scenarios
from tests.chaos.faults import FAULTS, Victims
from tests.chaos.witness import Witness
from tidemark.audit import audit_books

_SESSION_SECONDS = 6.0
_START_SECONDS = 120.0
_HEAL_SECONDS = 180.0

_LEFT = """
select (select count(*) from dirty_keys) as dirty_keys,
       (select count(*) from corrections where right_at is null) as corrections,
       (select count(*) from reprocessing_jobs where status in ('PENDING', 'PROCESSING')) as jobs,
       (select count(*) from outbox_events) as outbox
"""


@dataclass
class Report:
    """What a run did and found; wrong is empty when every promise was kept."""

    seed: int
    records: int = 0
    seconds: float = 0.0
    healed_in: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    snapshots: int = 0
    fenced: int = 0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One row of a table of seeds."""
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        verdict = "right" if not self.wrong else "WRONG"
        return (
            f"seed {self.seed}: {verdict}; {self.records:,} records, {sum(self.faults.values())} faults ({faults}), "
            f"{self.samples} samples, {self.snapshots:,} snapshots, healed in {self.healed_in:.0f} s"
        )


async def run(
    seed: int,
    seconds: float = 45.0,
    records: int = 6_000,
    say: Callable[[str], None] = print,
    sabotage: str | None = None,
) -> Report:
    """Start everything, break it for so many seconds, let it heal, and judge.

    sabotage: a name in tests.chaos.sabotage; the workers then run without that protection.
    """
    chance = random.Random(seed)
    report = Report(seed)
    events = _load(seed, records)
    report.records = len(events)
    async with _servers() as (folder, kafka, kafka_part, postgres, postgres_part):
        dsn = await postgres.create_database("chaos")
        postgres.published = kafka.published = True
        await migrate(dsn)
        witness = Witness(dsn)
        await witness.install()
        settings = load_named(
            broker_url=kafka.url,
            database_url=dsn,
            data_dir=folder / "stack",
            session_timeout_seconds=_SESSION_SECONDS,
            batch_records=100,
            reset_chunk_rows=3,
            valuation_keys=7,
            repair_after_seconds=5,
        )
        module = ["tests.chaos.sabotage", sabotage] if sabotage else ["tidemark"]
        program = [sys.executable, "-m", *module]
        stack = Stack(settings, program=program)
        spare_settings = settings.model_copy(update={"data_dir": folder / "spare"})
        spare = Stack(spare_settings, roles=["intake", "resets"], program=program)
        await stack.start()
        await spare.start()
        watching = asyncio.create_task(witness.watch())
        try:
            victims = Victims(stack, spare, kafka_part, postgres_part, dsn, _SESSION_SECONDS)
            started = time.monotonic()
            sending = asyncio.create_task(_send(settings.bootstrap_servers, events, seconds, chance.random()))
            await _break(victims, chance, seconds, report, say)
            await sending
            report.seconds = time.monotonic() - started
            report.wrong += await _heal(dsn, settings.bootstrap_servers)
            report.healed_in = time.monotonic() - started - report.seconds
            watching.cancel()
            report.samples = witness.samples
            report.wrong += await witness.verdict()
            audit = await audit_books(dsn, settings.cost_basis_method)
            report.snapshots = audit.snapshots
            report.wrong += map(str, audit.differences[:10])
            expected = scenarios.expected_books(events, settings.cost_basis_method)
            if audit.snapshots != expected.snapshot_count:
                report.wrong.append(f"{audit.snapshots} snapshots, expected {expected.snapshot_count}")
            logs = [*(folder / "stack" / "logs").glob("*.log"), *(folder / "spare" / "logs").glob("*.log")]
            report.fenced = sum(log.read_text(errors="replace").count("fenced") for log in logs)
        finally:
            watching.cancel()
            await spare.stop()
            await stack.stop()
            if report.wrong and not sabotage:
                kept = Path(tempfile.mkdtemp(prefix=f"tidemark-chaos-{seed}-"))
                shutil.copytree(folder / "stack" / "logs", kept / "stack")
                shutil.copytree(folder / "spare" / "logs", kept / "spare")
                say(f"logs kept in {kept}")
    return report


def _load(seed: int, records: int) -> list[scenarios.Event]:
    """A scenario in which no transaction id comes twice: then rows can be counted against offsets."""
    seen: set[str] = set()
    events = []
    for topic, record in scenarios.generate(seed, events=records):
        if topic == TRANSACTIONS:
            if record["transaction_id"] in seen:
                continue
            seen.add(record["transaction_id"])
        events.append((topic, record))
    return events


@asynccontextmanager
async def _servers() -> AsyncIterator[tuple[Path, KafkaServer, Part, PostgresServer, Part]]:
    folder = Path(tempfile.mkdtemp(prefix="tidemark-chaos-"))
    folder.chmod(0o711)  # noqa: ASYNC240
    ports = Ports(folder / "ports.json")
    kafka = KafkaServer(folder / "kafka", folder / "kafka.log", ports)
    postgres = PostgresServer(folder / "postgres", folder / "postgres.log", ports)
    kafka_part = Part("kafka", kafka.launch, kafka.ready, lambda: None)
    postgres_part = Part("postgres", postgres.launch, postgres.ready, lambda: None)
    try:
        await kafka.prepare()
        await postgres.prepare()
        await asyncio.gather(kafka_part.start(_START_SECONDS), postgres_part.start(_START_SECONDS))
        yield folder, kafka, kafka_part, postgres, postgres_part
    finally:
        await kafka_part.stop()
        await postgres_part.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _send(bootstrap: str, events: list[scenarios.Event], seconds: float, jitter: float) -> None:
    """In bursts, the last of them just before the faults end, so that there is always a backlog to lose."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, request_timeout_ms=120_000)
    await producer.start()
    try:
        pieces = max(4, int(seconds / 2))
        size = -(-len(events) // pieces)
        acks = []
        for first in range(0, len(events), size):
            for topic, record in events[first : first + size]:
                key = record.get("security_id", "").encode() or None
                acks.append(await producer.send(topic, json.dumps(record).encode(), key=key))
            await asyncio.sleep(seconds / pieces * (0.5 + jitter / 2))
        await asyncio.gather(*acks)
    finally:
        await producer.stop()


async def _break(
    victims: Victims, chance: random.Random, seconds: float, report: Report, say: Callable[[str], None]
) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(chance.uniform(0.5, 3.0))
        fault = chance.choices(list(FAULTS), list(FAULTS.values()))[0]
        what = await fault(victims, chance)
        report.faults[fault.__name__] += 1
        say(f"seed {report.seed}, {seconds - (end - time.monotonic()):5.1f} s: {what}")


async def _heal(dsn: str, bootstrap: str) -> list[str]:
    """Wait until everything sent is consumed and nothing is left to do; what is left is what is wrong."""
    left: dict[str, int] = {}
    deadline = time.monotonic() + _HEAL_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, TimeoutError):
            left = await _left(dsn, bootstrap)
            if not any(left.values()):
                return []
        await asyncio.sleep(0.5)
    return [f"stuck after {_HEAL_SECONDS:.0f} s: {left}"]


async def _left(dsn: str, bootstrap: str) -> dict[str, int]:
    try:
        connection = await connect(dsn)
    except Exception as error:
        if is_transient(error):
            raise OSError from error
        raise
    try:
        left = dict(await connection.fetchrow(_LEFT))
        left["lag"] = await _end(bootstrap) - await connection.fetchval(
            "select coalesce(sum(next_offset), 0)::bigint from kafka_offsets where consumer_group like '%intake'"
        )
    finally:
        await connection.close()
    return left


async def _end(bootstrap: str) -> int:
    """Records in the input topics."""
    consumer = AIOKafkaConsumer(BUSINESS_DATES, PRICES, TRANSACTIONS, bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        partitions: set[TopicPartition] = consumer.assignment()
        return sum((await consumer.end_offsets(partitions)).values())
    finally:
        await consumer.stop()
