"""One chaos run: a seed, a load, faults while there is a backlog; then the books and the witness must be right."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition

from deploy.local.stack import Stack
from sinks.database import connect, is_transient, migrate
from streams import topics
from streams.settings import Settings, load_named
from tests import processed
from tests.chaos import faults, load
from tests.chaos.cluster import Cluster, run_cluster
from tests.chaos.echo import Echo
from tests.chaos.faults import FAULTS, Victims
from tests.chaos.report import Injected, Report
from tests.chaos.sender import Partition, Sender
from tests.chaos.witness import Witness
from tests.reading import read_all
from tidemark.audit import audit_books
from tidemark.oracle.books import Books
from tidemark.oracle.fold import Inputs

_SESSION_SECONDS = 10.0
_ANSWER_SECONDS = 6.0  # how long a statement may go unanswered that nobody works on
_BACKLOG_SECONDS = 120.0
_STANDSTILL_SECONDS = 5.0
_RECOVERY_SECONDS = 60.0
_HEAL_SECONDS = 420.0
_OUTPUTS = (topics.TRIGGERS, topics.STATUS, topics.PROCESSED, topics.VALUATIONS, topics.DEAD_LETTERS)

_LEFT = """
select (select count(*) from dirty_keys) as dirty_keys,
       (select count(*) from corrections where right_at is null) as corrections,
       (select count(*) from reprocessing_jobs where status in ('PENDING', 'PROCESSING')) as jobs,
       (select count(*) from outbox_events) as outbox
"""


@dataclass(frozen=True)
class Plan:
    """How hard. per_topic: records in each input topic and in that of jobs; backlog: records that must wait when a
    fault comes."""

    per_topic: int = 100_000
    faults: int = 14
    backlog: int = 2_000
    brokers: int = 1
    batch_records: int = 300
    script: Sequence[str] = ()
    """Names of faults instead of those that the seed chooses."""
    at_once: float = 0.25
    """Of the faults: come while the one before is not over."""


def standard(seed: int) -> Plan:
    """What the table of seeds is made with: every fourth seed has three brokers."""
    return Plan(brokers=3 if seed % 4 == 0 else 1)


async def run(seed: int, plan: Plan, say: Callable[[str], None] = print) -> Report:
    """Start everything, break it while it works, let it heal, and judge."""
    report = Report(seed, plan.brokers)
    made = await asyncio.to_thread(load.make, seed, plan.per_topic)
    expected = await asyncio.to_thread(made.inputs.books, "FIFO")
    report.records = dict(made.counts)
    async with run_cluster(plan.brokers) as cluster:
        settings = _settings(cluster, plan)
        await migrate(cluster.direct_dsn)
        witness = Witness(cluster.direct_dsn, seed)
        await witness.install()
        program = [sys.executable, "-m", "tidemark"]
        # One with a name in its groups that outlives its workers, one without.
        stack = Stack(settings.model_copy(update={"group_instance_id": "stack"}), program=program)
        spare = Stack(
            settings.model_copy(update={"data_dir": cluster.folder / "spare"}),
            roles=["intake", "resets"],
            program=program,
        )
        await topics.ensure_topics(settings)
        await stack.start()
        await spare.start()
        sender = Sender(cluster.bootstrap, made.records)
        sender.start()
        echo = Echo(cluster.bootstrap, settings.topic(topics.JOBS), plan.per_topic)
        echo.start()
        witness.start()
        started = time.monotonic()
        try:
            victims = Victims(cluster, stack, spare, settings, program)
            chaos = Chaos(report, victims, sender, echo, started, say)
            await chaos.inject(seed, plan)
            report.seconds = time.monotonic() - started
            report.wrong += await chaos.heal()
            report.healed_in = time.monotonic() - started - report.seconds
            await witness.stop()
            await _judge(report, settings, cluster, witness, sender, made.inputs, expected)
        finally:
            await witness.stop()
            await asyncio.to_thread(sender.stop)
            await asyncio.to_thread(echo.stop)
            await spare.stop()
            await stack.stop()
            report.fenced = _count_in_logs(cluster.folder, "fenced")
            report.cuts = dict(cluster.postgres_proxy.cuts)
            if report.wrong or sys.exc_info()[0]:
                say(f"logs kept in {_keep_logs(cluster.folder, seed)}")
    return report


def _settings(cluster: Cluster, plan: Plan) -> Settings:
    return load_named(
        broker_url=f"kafka://{cluster.bootstrap.replace(',', ';')}",
        database_url=cluster.dsn,
        data_dir=cluster.folder / "stack",
        session_timeout_seconds=_SESSION_SECONDS,
        database_timeout_seconds=_ANSWER_SECONDS,
        replication_factor=plan.brokers,
        batch_records=plan.batch_records,
        reset_chunk_rows=20,
        valuation_keys=500,
        repair_after_seconds=5,
    )


class Chaos:
    """The faults of one run, and what was seen of each."""

    def __init__(
        self, report: Report, victims: Victims, sender: Sender, echo: Echo, started: float, say: Callable[[str], None]
    ) -> None:
        self._report = report
        self._victims = victims
        self._sender = sender
        self._echo = echo
        self._started = started
        self._say = say
        self._dsn = victims.cluster.direct_dsn
        self._settled = True

    async def inject(self, seed: int, plan: Plan) -> None:
        """One fault after another, each with a share of the load let loose before it and a backlog to meet."""
        names = list(plan.script) or faults.choose(seed, plan.faults)
        for number, name in enumerate(names, 1):
            chance = random.Random(f"fault {seed} {number}")
            lags = await self._backlog(number / len(names), plan.backlog, 3 * plan.per_topic * 3 // (2 * len(names)))
            self._say(f"seed {seed}, {time.monotonic() - self._started:5.1f} s: {name} at a lag of {lags.total():,}")
            await self._one(name, lags, chance, plan.at_once)
            await asyncio.sleep(chance.uniform(0, 1))

    async def _one(self, name: str, lags: Counter[Partition], chance: random.Random, at_once: float) -> None:
        at = time.monotonic()
        by_topic: Counter[str] = Counter()
        for (topic, _), lag in lags.items():
            by_topic[topic] += lag
        injected = Injected(name, "", round(at - self._started, 1), lags.total(), dict(by_topic))
        self._report.faults.append(injected)
        before = await self._offsets()
        injected.what = await FAULTS[name](self._victims, chance)
        if name == "crash_postgres":
            at = await self._postgres_back()
        elsewhere = name.endswith("_worker") and "intake" not in injected.what  # no input partition concerned
        injected.alone, self._settled = self._settled, elsewhere and self._settled
        if chance.random() >= at_once and not elsewhere:
            injected.recovered_in = await self._recovered(at, before, lags)
            self._settled = injected.recovered_in is not None
        took = "" if injected.recovered_in is None else f", recovered in {injected.recovered_in:.1f} s"
        self._say(f"    {injected.what}{took}")

    async def _backlog(self, share: float, least: int, most: int) -> Counter[Partition]:
        """Let the next share of the load loose; returns, by partition, what waits once it is enough to meet.

        No offset moves meanwhile, so that the workers cannot be faster. Before, no more than one and a half shares may
        wait, so that the faults are spread over the load.
        """
        await self._lag(0, most, _BACKLOG_SECONDS)
        async with self._standstill():
            self._sender.release(share)
            lags = await self._lag(least, 10 * most, _STANDSTILL_SECONDS)
        if lags.total() >= least:
            return lags
        return await self._lag(least, most, _BACKLOG_SECONDS)  # Postgres or the broker is away

    async def _lag(self, least: int, most: int, seconds: float) -> Counter[Partition]:
        """What waits, once it is between these, or when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                lags = _lags(self._sender.ends, await self._offsets())
                if least <= lags.total() <= most or time.monotonic() > deadline:
                    return lags
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def _standstill(self) -> AsyncIterator[None]:
        """As long as it lasts no worker commits an offset, where Postgres is there."""
        connection = None
        try:
            connection = await connect(self._dsn)
            await connection.execute("begin; set local lock_timeout = '2s'; lock table kafka_offsets in exclusive mode")
        except Exception as error:
            if not is_transient(error):
                raise
        try:
            yield
        finally:
            if connection:
                connection.terminate()

    async def _recovered(self, at: float, before: Counter[Partition], lags: Counter[Partition]) -> float | None:
        """Seconds until every partition that had a lag has moved on; None when that takes too long to wait for."""
        while time.monotonic() - at < _RECOVERY_SECONDS:
            with contextlib.suppress(OSError, TimeoutError):
                now = await self._offsets()
                if all(now[place] > before[place] for place, lag in lags.items() if lag):
                    return round(time.monotonic() - at, 1)
            await asyncio.sleep(0.1)
        return None

    async def _postgres_back(self) -> float:
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                await self._offsets()
                return time.monotonic()
            await asyncio.sleep(0.05)

    async def _offsets(self) -> Counter[Partition]:
        """What Postgres holds. Raises OSError while it is away."""
        rows = await _fetch(self._dsn, "select topic, partition, next_offset from kafka_offsets")
        return Counter({(row["topic"], row["partition"]): row["next_offset"] for row in rows})

    async def heal(self) -> list[str]:
        """Wait until everything is sent and consumed and nothing is left to do; what is left is what is wrong."""
        self._sender.release(1)
        left: dict[str, int] = {}
        deadline = time.monotonic() + _HEAL_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError):
                left = dict((await _fetch(self._dsn, _LEFT))[0])
                left["unsent"] = not self._sender.done
                left["lag"] = _lags(self._sender.ends, await self._offsets()).total()
                if not any(left.values()):
                    self._echo.finish()
                left["jobs unsent"] = not self._echo.done
                left["job lag"] = _lags(self._echo.ends, await self._offsets()).total()
                if not any(left.values()):
                    return self._sender.failed[:3]
            await asyncio.sleep(0.5)
        return [f"stuck after {_HEAL_SECONDS:.0f} s: {left}"]


def _lags(ends: Counter[Partition], offsets: Counter[Partition]) -> Counter[Partition]:
    return Counter({place: end - offsets[place] for place, end in dict(ends).items()})


async def _fetch(dsn: str, query: str) -> list[dict[str, int]]:
    try:
        connection = await connect(dsn)
        try:
            return [dict(row) for row in await connection.fetch(query)]
        finally:
            await connection.close(timeout=2)
    except Exception as error:
        if is_transient(error):
            raise OSError from error
        raise


async def _judge(
    report: Report,
    settings: Settings,
    cluster: Cluster,
    witness: Witness,
    sender: Sender,
    inputs: Inputs,
    expected: Books,
) -> None:
    report.samples, report.audited = witness.samples, witness.audited
    report.figures = await witness.figures()
    report.wrong += await witness.verdict(sender.bad)
    report.wrong += await _inputs_differ(cluster.direct_dsn, inputs)
    audit = await audit_books(cluster.direct_dsn, settings.cost_basis_method)
    report.snapshots = audit.snapshots
    report.wrong += map(str, audit.differences[:10])
    if (audit.snapshots, len(audit.waiting)) != (expected.snapshot_count, 0):
        report.wrong.append(
            f"{audit.snapshots} snapshots, {len(audit.waiting)} keys waiting; expected {expected.snapshot_count}, 0"
        )
    report.wrong += await _outbox_lost(settings, witness)
    report.wrong += await _downstream_wrong(settings, cluster.direct_dsn, report)
    jobs, lag = await _job_topic(settings, cluster.direct_dsn)
    report.records[topics.JOBS] = jobs
    if lag:
        report.wrong.append(f"{lag} job records not consumed")


async def _inputs_differ(dsn: str, inputs: Inputs) -> list[str]:
    """The sinks' tables hold what was sent, latest revisions, and nothing else."""
    stored = {
        "transactions": {
            (row["transaction_id"], row["revision"], row["cancelled"])
            for row in await _fetch(dsn, "select transaction_id, revision, cancelled from transactions")
        },
        "prices": {
            (row["security_id"], row["price_date"], row["price"], row["revision"])
            for row in await _fetch(dsn, "select security_id, price_date, price, revision from market_prices")
        },
        "business dates": {row["business_date"] for row in await _fetch(dsn, "select * from business_dates")},
    }
    sent = {
        "transactions": {(t.transaction_id, t.revision, t.cancelled) for t in inputs.transactions.values()},
        "prices": {(p.security_id, p.price_date, p.price, p.revision) for p in inputs.prices.values()},
        "business dates": set(inputs.business_dates),
    }
    return [
        f"{what}: {len(sent[what] - found)} lost, {len(found - sent[what])} that were not sent"
        for what, found in stored.items()
        if found != sent[what]
    ]


async def _outbox_lost(settings: Settings, witness: Witness) -> list[str]:
    """Every outbox row that was ever committed is in Kafka, and per key ids grow (a repetition apart)."""
    written = await witness.outbox()
    published: set[int] = set()
    highest: dict[tuple[str, bytes | None], int] = {}
    disorder = 0
    records, _ = await read_all(settings, *_OUTPUTS)
    for record in records:
        number = int(dict(record.headers)["event_id"])
        key = (record.topic, record.key)
        if number not in published and record.key is not None:
            disorder += number < highest.get(key, 0)
            highest[key] = max(number, highest.get(key, 0))
        published.add(number)
    wrong = []
    if lost := sorted(written.keys() - published):
        wrong.append(f"{len(lost)} outbox rows never reached Kafka, the first: {lost[0]} {written[lost[0]]}")
    if unknown := published - written.keys():
        wrong.append(f"{len(unknown)} events published that were never committed")
    if disorder:
        wrong.append(f"{disorder} events overtook another of their key")
    return wrong


async def _downstream_wrong(settings: Settings, dsn: str, report: Report) -> list[str]:
    """A consumer that keeps the highest epoch per key has the live history, wherever it began to read."""
    connection = await connect(dsn)
    try:
        wrong, report.keys_compared = await processed.check(settings, connection, random.Random(report.seed), 3)
    finally:
        await connection.close()
    return [f"transactions-processed, read {line[:300]}" for line in wrong[:3]]


async def _job_topic(settings: Settings, dsn: str) -> tuple[int, int]:
    """(records ever written, records that the watermark sink has not passed)."""
    partitions = [TopicPartition(settings.topic(topics.JOBS), n) for n in range(settings.internal_partitions)]
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.bootstrap_servers)
    await consumer.start()
    try:
        ends = sum((await consumer.end_offsets(partitions)).values())
    finally:
        await consumer.stop()
    rows = await _fetch(
        dsn,
        f"select sum(next_offset)::bigint as passed from kafka_offsets where topic = '{settings.topic(topics.JOBS)}'",
    )
    return ends, ends - rows[0]["passed"]


def _count_in_logs(folder: Path, word: str) -> int:
    return sum(log.read_text(errors="replace").count(word) for log in folder.glob("*/logs/*.log*"))


def _keep_logs(folder: Path, seed: int) -> Path:
    kept = Path(tempfile.mkdtemp(prefix=f"tidemark-chaos-{seed}-"))
    for log in [*folder.glob("*/logs/*.log*"), *folder.glob("*.log")]:
        target = kept / log.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, target)
    return kept
