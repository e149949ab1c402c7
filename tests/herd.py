"""The watermark sink without Kafka: real window, fence, limiter and chunks on a real Postgres, jobs given by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import asyncpg
import msgspec

from sinks import corrections, resets
from sinks.batches import Batch, Place
from sinks.database import Pool, connect_pool
from sinks.model import Job
from sinks.offsets import Claim, Offsets
from streams.herd import Herd
from streams.settings import Settings, load_named
from streams.tracing import Traces

TOPIC = "reprocessing-jobs"

_KEYS = """
insert into position_state (security_id, portfolio_id, watermark_date, closed_on)
select s.id, 'P' || lpad(p::text, 7, '0'), (select max(business_date) from business_dates),
       case when p % 100 < $3 then date '2025-01-01' end
from unnest($1::text[]) as s (id) cross join generate_series(1, $2::int) as p
"""

_HISTORY = """
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, position_date, quantity,
                              cost_basis, realized_gain_loss)
select security_id, portfolio_id, 0, 1, security_id || portfolio_id, '2025-01-01', 10, 100, 0
from position_state where security_id = any($1::text[]) and closed_on is null
"""

_SNAPSHOTS = """
insert into daily_position_snapshots (security_id, portfolio_id, valuation_date, epoch, quantity, cost_basis, price,
                                      price_date, market_value, unrealized_gain_loss, valuation_status)
select s.security_id, s.portfolio_id, d.business_date, 0, 10, 100, m.price, m.price_date, 10 * m.price,
       10 * m.price - 100, 'VALUED_CURRENT'
from position_state s
cross join business_dates d
join market_prices m on m.security_id = s.security_id and m.price_date = d.business_date
where s.security_id = any($1::text[]) and s.closed_on is null
"""

_PRICES = """
insert into market_prices (security_id, price_date, price, currency, revision)
select s.id, business_date, 20, 'USD', 0 from unnest($1::text[]) as s (id) cross join business_dates
"""


async def load(
    pool: asyncpg.Pool,
    securities: Sequence[str],
    keys: int,
    *,
    dates: int = 20,
    closed: int = 0,
    snapshots: bool = True,
) -> None:
    """Valued books: each security held in `keys` portfolios over so many dates; `closed`: per cent of them closed."""
    ids = list(securities)
    days = [date(2025, 1, 1 + n) for n in range(dates)]
    await pool.execute("insert into business_dates select unnest($1::date[]) on conflict do nothing", days)
    await pool.execute("insert into securities select unnest($1::text[]), $2", ids, days[-1])
    await pool.execute(_PRICES, ids)
    await pool.execute(_KEYS, ids, keys, closed)
    await pool.execute(_HISTORY, ids)
    if snapshots:
        await pool.execute(_SNAPSHOTS, ids)


async def issue(pool: asyncpg.Pool, securities: Sequence[str], day: date, reason: str = "price") -> list[Job]:
    """A correction of each security from the day on, and the job that the trigger agent would publish for it."""
    async with pool.acquire() as connection, connection.transaction():
        seqs = await corrections.issue(connection, [(security, day) for security in securities], reason)
    return [Job(seq, security, day, seq, datetime.now(UTC)) for security, seq in seqs.items()]


async def reset(pool: asyncpg.Pool, jobs: Sequence[Job]) -> int:
    """Open the jobs and carry them out, without window, limiter and fence; returns how many keys were reset."""
    async with pool.acquire() as connection, connection.transaction():
        opened = await resets.open_jobs(connection, jobs)
    async with pool.acquire() as connection, connection.transaction():
        return (await resets.reset_small(connection, opened)).keys_reset


@dataclass(frozen=True)
class JobRecord:
    """A record of the job topic."""

    offset: int
    value: bytes | None
    key: bytes | None = None


class HerdWorker:
    """One worker of the role `resets`; Kafka's part is `give`."""

    def __init__(self, settings: Settings, pool: Pool, group: str) -> None:
        self.settings = settings
        self.should_stop = False
        self.rebalancing = False
        self.traces = Traces()
        self.offsets = Offsets(self.pool, group, lambda: self.should_stop)
        self.herd = Herd(self)
        self._pool = pool
        self._claims: dict[int, Claim] = {}
        self._ends: Counter[int] = Counter()
        self.outbox = 0

    async def pool(self) -> Pool:
        return self._pool

    def outbox_written(self) -> None:
        self.outbox += 1

    def fenced(self, place: Place) -> None:
        """No worker to start anew."""

    async def claim(self, partition: int) -> None:
        """As on assignment."""
        self._claims[partition] = (await self.offsets.claim({(TOPIC, partition): 0}))[TOPIC, partition]
        self._ends[partition] = self._claims[partition].next_offset

    async def give(self, partition: int, jobs: Sequence[Job | None]) -> None:
        """The next batch of the partition."""
        start = self._ends[partition]
        records = [
            JobRecord(start + n, job and msgspec.json.encode(job), job and job.security_id.encode())
            for n, job in enumerate(jobs)
        ]
        self._ends[partition] += len(records)
        await self.herd.take(Batch(TOPIC, partition, self._claims[partition].epoch, start, records))

    async def drained(self) -> None:
        """Until no job is left in the window."""
        while not self.herd.idle:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def stored(self, partition: int) -> int:
        """The partition's offset in Postgres."""
        held = self.offsets.held((TOPIC, partition))
        assert held is not None
        return held.next_offset


@asynccontextmanager
async def herd_worker(
    dsn: str, folder: Path, partitions: int = 1, group: str = "herd", **changes: object
) -> AsyncIterator[HerdWorker]:
    """A running worker that has claimed partitions 0 to n-1."""
    settings = load_named(data_dir=folder, **{"reset_rows_per_second": 1e9, **changes})
    pool = await connect_pool(dsn, size=4)
    worker = HerdWorker(settings, pool, group)
    for partition in range(partitions):
        await worker.claim(partition)
    running = asyncio.create_task(worker.herd.run())
    try:
        yield worker
    finally:
        worker.should_stop = True
        await running
        await pool.close()


async def until(pool: asyncpg.Pool, query: str, *arguments: object, seconds: float = 120) -> None:
    """Wait for the query to say true; fails with the query."""
    try:
        async with asyncio.timeout(seconds):
            while not await pool.fetchval(query, *arguments):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not after {seconds:.0f} s: {query}") from None


ALL_ENDED = "select not exists (select from reprocessing_jobs where status in ('PENDING', 'PROCESSING'))"
