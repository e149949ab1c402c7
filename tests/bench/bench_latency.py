"""One late price on an idle topology: how long until the books are right, and where the time goes.

The price goes through Kafka, four workers and Postgres. Each is sent when the one before is right and after a random
pause, so that a polling interval of the program would show as a stage whose times are spread evenly from nothing to
the interval. Beside it the same statements one after another in one process, without Kafka: what is left is waiting.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from sinks import calendar, positions, prices
from sinks.database import Pool, connect_pool
from sinks.model import Price, Transaction
from sinks.valuation import Valuation
from streams.settings import Settings
from streams.topics import PRICES, STATUS, TRIGGERS
from tests.bench.bench_growth import correct
from tests.bench.harness import AS_BY_DEFAULT, Bench, Point, Result, percentile
from tests.topology import run_topology

_HOLDERS = 1_000
_DATES = 20
_DAYS = [date(2025, 1, 1) + timedelta(days=n) for n in range(_DATES)]
_LATE = _DAYS[-15]
_SECURITY = "LATE"
_WARM_UP = 5  # late prices until plans and connections have settled
_LONGEST_PAUSE = 1.0  # seconds; longer than any polling interval
_QUICK_PAUSE = 0.1
_LONGEST_SECONDS = 60.0
_VALUATION_KEYS = 2_000

# When statements that move watermarks began their transaction and ended, and which worker ran them: a row of its own
# for each statement, so what it costs is not seen. Nothing else tells when a valuation begins.
_WATCH = """
create table bench_moves (began timestamptz, ended timestamptz, worker text);
create function bench_note_move() returns trigger language plpgsql as $$ begin
    insert into bench_moves values (now(), clock_timestamp(), current_setting('application_name'));
    return null;
end $$;
create trigger bench_note_move after update on position_state
    for each statement execute function bench_note_move();
"""

_MOMENTS = """
select c.issued_at as stored, j.created_at as decided, c.reset_at as reset, c.right_at as right,
       resets.began as reset_begun, books.began as valuation_begun, books.ended as valued
from corrections c
join reprocessing_jobs j using (job_id)
cross join lateral (
    select min(began) as began from bench_moves where worker = 'tidemark-resets' and ended > c.issued_at
) as resets
cross join lateral (
    select min(began) as began, max(ended) as ended
    from bench_moves where worker = 'tidemark-books' and ended between c.reset_at and c.right_at
) as books
where c.seq = $1
"""

_STAGES = (
    ("sent", "acked", "price in Kafka (acks from all)"),
    ("acked", "stored", "correction in Postgres"),
    ("stored", TRIGGERS, "trigger published"),
    (TRIGGERS, "decided", "job created"),
    ("decided", "reset_begun", "job published, read and opened; reset begun"),
    ("reset_begun", "reset", "watermarks reset"),
    ("reset", "valuation_begun", "valuation begun"),
    ("valuation_begun", "valued", "valued"),
    ("valued", "right", "right in Postgres"),
    ("right", "BOOKS_RIGHT", "BOOKS_RIGHT published"),
    ("BOOKS_RIGHT", "told", "BOOKS_RIGHT read by a consumer"),
)
"""From a moment to the next, and what has happened by then. The times of Kafka's records are whole milliseconds."""

Moments = dict[str, float]
"""Seconds since 1970 by name; Postgres, the workers and this process run on one machine."""


async def run(bench: Bench) -> None:
    """p50 and p99 until the books are right, in Postgres and in Kafka, and every stage."""
    count = bench.size(100, 5)
    kafka = await bench.kafka()
    async with bench.database() as dsn, bench.database() as other_dsn:
        await _fill(dsn)
        await _fill(other_dsn)
        async with (
            await connect_pool(other_dsn, size=2) as other,
            run_topology(kafka, dsn, bench.folder, **AS_BY_DEFAULT) as topology,
            _observed(topology.settings, topology.pool) as observer,
        ):
            direct = Direct(other)
            await _one_after_another(bench, observer, direct, bench.size(_WARM_UP, 2), "warm-up")
            found, alone = await _one_after_another(bench, observer, direct, count, "late price")
    _report(bench, found, alone)


async def _one_after_another(
    bench: Bench, observer: Observer, direct: Direct, count: int, name: str
) -> tuple[list[Moments], list[float]]:
    """The moments of each late price, and the seconds that the statements alone take, measured in the pauses."""
    chance = random.Random(1)
    found, alone = [], []
    for number in range(count):
        if number % 10 == 0:
            bench.say(f"latency: {name} {number + 1} of {count}")
        alone.append(await direct.late_price())
        await asyncio.sleep(chance.uniform(0, _QUICK_PAUSE if bench.quick else _LONGEST_PAUSE))
        found.append(await observer.late_price())
    return found, alone


def _report(bench: Bench, found: Sequence[Moments], alone: Sequence[float]) -> None:
    total = _milliseconds(found, "sent", "right")
    told = _milliseconds(found, "sent", "told")
    plain = [1_000 * seconds for seconds in alone]
    name, note = f"one late price, {_HOLDERS:,} holders, idle", f"{len(found)} prices"
    baseline = "the same statements, no Kafka"
    bench.add(Result(f"{name}: right in Postgres, p50", "ms", total, baseline, plain, note=note, less=True))
    bench.add(
        Result(
            f"{name}: right in Postgres, p99",
            "ms",
            [percentile(99, total)],
            baseline,
            [percentile(99, plain)],
            note=note,
            less=True,
        )
    )
    for percent, times in (("p50", told), ("p99", [percentile(99, told)])):
        bench.add(Result(f"{name}: BOOKS_RIGHT in a consumer's hands, {percent}", "ms", times, note=note, less=True))
    for number, (begin, end, what) in enumerate(_STAGES, 1):
        times = _milliseconds(found, begin, end)
        spread = f"10 % below {percentile(10, times):.1f}, 90 % below {percentile(90, times):.1f}"
        point = Point(name, what, number)
        bench.add(Result(f"  {number}. {what}", "ms", times, note=spread, less=True, point=point))


def _milliseconds(found: Sequence[Moments], begin: str, end: str) -> list[float]:
    return [1_000 * (moments[end] - moments[begin]) for moments in found]


# -- a late price through the topology ----------------------------------------------------------------------------


@dataclass
class Observer:
    """Sends late prices and reads what each leaves behind, in Kafka and in Postgres."""

    settings: Settings
    pool: Pool
    producer: AIOKafkaProducer
    consumer: AIOKafkaConsumer
    price: int = 100
    seen: dict[int, Moments] = field(default_factory=dict)

    async def late_price(self) -> Moments:
        """Its moments, once the books are right again."""
        self.price += 1
        late = {"security_id": _SECURITY, "price_date": _LATE.isoformat(), "price": str(self.price)}
        value = json.dumps(late).encode()
        moments = {"sent": time.time()}
        await self.producer.send_and_wait(self.settings.topic(PRICES), value, key=_SECURITY.encode())
        moments["acked"] = time.time()
        async with asyncio.timeout(_LONGEST_SECONDS):
            seq = await self._read_until_right()
        moments |= self.seen.pop(seq)
        row = await self.pool.fetchrow(_MOMENTS, seq)
        await self.pool.execute("truncate bench_moves")
        return moments | {name: at.timestamp() for name, at in row.items()}

    async def _read_until_right(self) -> int:
        """The sequence number of the correction that the topics have told everything about."""
        wanted = {TRIGGERS, "BOOKS_RIGHT"}
        while True:
            record = await self.consumer.getone()
            if record.value is None:
                continue
            value = json.loads(record.value)
            name = value.get("status") or record.topic.removeprefix(self.settings.topic_prefix)
            seq = value.get("job_id") or value["seq"]  # one correction at a time: its job has its number
            moments = self.seen.setdefault(seq, {})
            moments[name] = record.timestamp / 1_000
            if name == "BOOKS_RIGHT":
                moments["told"] = time.time()
            if wanted <= moments.keys():
                return int(seq)


@asynccontextmanager
async def _observed(settings: Settings, pool: Pool) -> AsyncIterator[Observer]:
    await pool.execute(_WATCH)
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, acks="all")
    consumer = AIOKafkaConsumer(
        *(settings.topic(name) for name in (TRIGGERS, STATUS)),
        bootstrap_servers=settings.bootstrap_servers, auto_offset_reset="latest", fetch_max_wait_ms=100,
    )  # fmt: skip
    await producer.start()
    await consumer.start()
    try:
        for place in consumer.assignment():
            await consumer.position(place)  # from here on nothing is missed
        yield Observer(settings, pool, producer, consumer)
    finally:
        await consumer.stop()
        await producer.stop()


# -- the same statements without Kafka ----------------------------------------------------------------------------


class Direct:
    """Late prices one after another by the sinks' own functions."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._valuation = Valuation(pool, _VALUATION_KEYS)
        self._price = Decimal(100)

    async def late_price(self) -> float:
        """Seconds until the books are right again."""
        self._price += 1
        started = time.perf_counter()
        await correct(self._pool, self._valuation, Price(_SECURITY, _LATE, self._price))
        return time.perf_counter() - started


async def _fill(dsn: str) -> None:
    """Valued books, by the sinks themselves, so that the auditor in the background has nothing to tell."""
    at = datetime.combine(_DAYS[0], datetime.min.time(), UTC)
    trades = [
        Transaction(f"T{n:05}", f"P{n:05}", _SECURITY, at, "BUY", Decimal(10), Decimal(20), Decimal(200))
        for n in range(_HOLDERS)
    ]
    steps: list[Callable[[Any], Awaitable[Any]]] = [
        lambda c: prices.apply(c, [Price(_SECURITY, day, Decimal(20)) for day in _DAYS]),
        lambda c: positions.apply(c, list(enumerate(trades)), "FIFO"),
        lambda c: calendar.apply(c, _DAYS),
    ]
    async with await connect_pool(dsn, size=2) as pool:
        for step in steps:
            async with pool.acquire() as connection, connection.transaction():
                await step(connection)
        valuation = Valuation(pool, _VALUATION_KEYS)
        while (await valuation.pass_once()).keys:
            pass
        await pool.execute("truncate outbox_events")
        await pool.execute("vacuum analyze")
