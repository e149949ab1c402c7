"""Growth: what a correction costs per affected row, and an append per transaction, as the tables grow around them.

Kafka is left out. The same work is done in tables of three sizes, in turn; the smallest is the baseline. What is
affected is the same in all of them, so a ratio of 1 means that size does not matter; wanted is at most 1.5.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from sinks import positions, prices
from sinks.database import Pool, connect_pool
from sinks.model import Job, Price, Transaction, TransactionType
from sinks.valuation import Pass, Valuation
from tests.bench.harness import Bench, Point, Result, Work
from tests.herd import load, reset

_SETTLING = 3  # rounds until the plans and the free space have settled
_REPEATED = 3  # corrections in a round: their median counts
_MOST = 1.5  # wanted: the largest size beside the smallest
_LONGEST_SECONDS = 120.0

_VALUATION_KEYS = 2_000
_KEYS_OF_A_SECURITY = 1_000
_TARGET = "TARGET"
_FIRST = date(2020, 1, 1)


async def run(bench: Bench) -> None:
    """By keys, by business dates, by securities due at once, by transactions of a key."""
    await _by_keys(bench)
    await _by_dates(bench)
    await _by_securities(bench)
    await _by_transactions(bench)


async def correct(pool: Pool, valuation: Valuation, late: Price) -> int:
    """One late price from the price sink until the books are right, without Kafka; returns the snapshots written."""
    async with pool.acquire() as connection, connection.transaction():
        seq = (await prices.apply(connection, [late])).corrections[late.security_id]
    job = Job(seq, late.security_id, late.price_date, seq, datetime.now(UTC))
    await reset(pool, [job])
    snapshots = 0
    async with asyncio.timeout(_LONGEST_SECONDS):
        while True:
            done = await valuation.pass_once()
            snapshots += done.snapshots
            if any(right.seq == seq for right in done.right):
                return snapshots


async def _compare(
    bench: Bench,
    name: str,
    unit: str,
    axis: str,
    sizes: Sequence[tuple[int, AbstractAsyncContextManager[Work]]],
    note: str,
) -> None:
    """Run all sizes in turn, settle first, and keep a line for each; the first is the baseline of the others.

    sizes: each with what fills a database in and gives the work; all are open until the end.
    """
    async with AsyncExitStack() as databases:
        works: list[Work] = []
        for size, filled in sizes:
            bench.say(f"growth: filling in {size:,} {axis}")
            works.append(await databases.enter_async_context(filled))
        figures = await _in_turn(bench, name, works)
    labels = [f"{size:,} {axis}" for size, _ in sizes]
    lines = [
        Result(f"{name}: {label}", unit, rounds, less=True, point=Point(name, axis, size))
        for label, (size, _), rounds in zip(labels, sizes, figures, strict=True)
    ]
    bench.add(replace(lines[0], note=note))
    for line in lines[1:]:
        bench.add(replace(line, baseline=labels[0], baseline_rounds=figures[0], wanted=_MOST))


async def _in_turn(bench: Bench, name: str, works: Sequence[Work]) -> list[list[float]]:
    """Each work's figures, those of the settling rounds left out."""
    figures: list[list[float]] = [[] for _ in works]
    settling_rounds = bench.size(_SETTLING, 1)
    for number in range(settling_rounds + bench.rounds):
        settling = number < settling_rounds
        bench.say(f"{name}: " + ("settling" if settling else f"round {number - settling_rounds + 1} of {bench.rounds}"))
        for work, kept in zip(works, figures, strict=True):
            figure = await work()
            if not settling:
                kept.append(figure)
    return figures


# -- a correction among more and more keys, and over a longer and longer calendar ---------------------------------

_CALENDAR = "insert into business_dates select $1::date + n from generate_series(0, $2::int - 1) as n"

_SECURITIES = "insert into securities select unnest($1::text[]), (select max(business_date) from business_dates)"

# None after the late date: the corrected price is carried on, so that every dirty date changes.
_PRICES = """
insert into market_prices (security_id, price_date, price, currency, revision)
select s.id, business_date, 20, 'USD', 0
from unnest($1::text[]) as s (id) cross join business_dates where business_date <= $2
"""

_KEYS = """
insert into position_state (security_id, portfolio_id, watermark_date)
select s.id, 'P' || lpad(p::text, 7, '0'), (select max(business_date) from business_dates)
from unnest($1::text[]) as s (id) cross join generate_series(1, $2::int) as p
"""

# A purchase on the first date and, while $3, on every tenth: the same ones lie within the dirty dates, whatever the
# size of the calendar (a multiple of ten).
_HISTORY = """
insert into position_history (security_id, portfolio_id, epoch, sequence, transaction_id, position_date, quantity,
                              cost_basis, realized_gain_loss)
select security_id, portfolio_id, 0, k, security_id || portfolio_id || '-' || k, $2::date + day, 10 * k, 100 * k, 0
from position_state
cross join (
    select n as day, row_number() over (order by n) as k
    from generate_series(0, (select max(business_date) from business_dates) - $2::date) as n
    where n = 0 or $3 and n % 10 = 6
) as trades
where security_id = any($1::text[])
"""

# Date after date, as the days were closed: so they lie together on the disk.
_SNAPSHOTS = """
insert into daily_position_snapshots (security_id, portfolio_id, valuation_date, epoch, quantity, cost_basis, price,
                                      price_date, market_value, unrealized_gain_loss, valuation_status)
select security_id, portfolio_id, business_date, 0, 10 * k, 100 * k, 20, business_date, 200 * k, 100 * k,
       'VALUED_CURRENT'
from position_state
cross join (
    select business_date, case when $3 then 1 + (business_date - $2::date + 4) / 10 else 1 end as k
    from business_dates where $3 or business_date = (select max(business_date) from business_dates)
) as days
where security_id = any($1::text[])
order by business_date, security_id, portfolio_id
"""


@dataclass(frozen=True)
class _Books:
    """Valued books. dates: closed, a multiple of ten; dirty: the last ones, which the correction reaches; holders: of
    the corrected security; others: keys of other securities, each with one transaction and its latest snapshot."""

    dates: int
    dirty: int
    holders: int
    others: int = 0

    @property
    def late_date(self) -> date:
        """The first dirty date."""
        return _FIRST + timedelta(days=self.dates - self.dirty)

    async def fill(self, pool: Pool) -> None:
        """Into a fresh database, set-based."""
        others = [f"O{n:05}" for n in range(self.others // _KEYS_OF_A_SECURITY)]
        await pool.execute(_CALENDAR, _FIRST, self.dates)
        for securities, keys, detailed in (([_TARGET], self.holders, True), (others, _KEYS_OF_A_SECURITY, False)):
            await pool.execute(_SECURITIES, securities)
            await pool.execute(_PRICES, securities, self.late_date)
            await pool.execute(_KEYS, securities, keys)
            await pool.execute(_HISTORY, securities, _FIRST, detailed)
            await pool.execute(_SNAPSHOTS, securities, _FIRST, detailed)
        await pool.execute("vacuum analyze")


async def _by_keys(bench: Bench) -> None:
    dirty = 20
    keys = [bench.size(full, quick) for full, quick in ((10_000, 1_000), (100_000, 5_000), (1_000_000, 20_000))]
    books = [(n, _Books(30, dirty, 1_000, n - 1_000)) for n in keys]
    await _corrections(bench, f"correction, 1,000 holders, {dirty} dirty dates", "keys", books)


async def _by_dates(bench: Bench) -> None:
    dirty = 6  # the last date but five, and what follows
    dates = [bench.size(full, quick) for full, quick in ((10, 10), (100, 50), (1_000, 100))]
    holders = bench.size(2_000, 500)
    books = [(n, _Books(n, dirty, holders)) for n in dates]
    await _corrections(bench, f"correction, {holders:,} holders, {dirty} dirty dates", "dates of history", books)


async def _corrections(bench: Bench, name: str, axis: str, sizes: Sequence[tuple[int, _Books]]) -> None:
    rows = sizes[0][1].holders * sizes[0][1].dirty
    works = [(size, _corrected(bench, books)) for size, books in sizes]
    await _compare(bench, name, "µs per snapshot", axis, works, f"{rows:,} snapshots change")


@asynccontextmanager
async def _corrected(bench: Bench, books: _Books) -> AsyncIterator[Work]:
    """Microseconds per snapshot that changes, of a correction in such books."""
    async with bench.database() as dsn, await connect_pool(dsn, size=2) as pool:
        await books.fill(pool)
        valuation, price, rows = Valuation(pool, _VALUATION_KEYS), Decimal(20), books.holders * books.dirty

        async def once() -> float:
            nonlocal price
            price += 1
            await pool.execute("truncate outbox_events")
            await pool.execute("vacuum position_state, daily_position_snapshots, securities, corrections")
            started = time.perf_counter()
            snapshots = await correct(pool, valuation, Price(_TARGET, books.late_date, price))
            seconds = time.perf_counter() - started
            assert snapshots == rows, f"{snapshots} snapshots were written, not {rows}"
            return seconds / rows * 1e6

        yield lambda: _median_of(once, bench.size(_REPEATED, 1))


async def _median_of(once: Callable[[], Awaitable[float]], repeated: int) -> float:
    return statistics.median([await once() for _ in range(repeated)])


# -- more and more securities corrected at once -------------------------------------------------------------------

_HELD_BY = 2  # portfolios
_LATE = date(2025, 1, 4)  # the last date but one

# As resets leave the books: every key of every security due from the late date on, for a correction of its own.
_CORRECT_ALL = """
with corrected as (
    insert into corrections (seq, security_id, earliest_date, reason, job_id, reset_at)
    select seq, security_id, $1, 'price', seq, clock_timestamp()
    from (select nextval('correction_seq') as seq, security_id from securities) as issued
), repriced as (
    update market_prices set price = price + 1 where price_date = $1
), due as (
    update securities set valued_through = $1::date - 1
)
update position_state set watermark_date = $1::date - 1, status = 'REPROCESSING'
"""


async def _by_securities(bench: Bench) -> None:
    securities = [bench.size(full, quick) for full, quick in ((1_000, 100), (10_000, 500), (50_000, 2_000))]
    works = [(n, _crowded(bench, n)) for n in securities]
    note = f"{_HELD_BY} keys each, 2 snapshots of a key change"
    await _compare(bench, "all securities corrected", "µs per key", "securities", works, note)


@asynccontextmanager
async def _crowded(bench: Bench, securities: int) -> AsyncIterator[Work]:
    """Microseconds per key, from the reset of every security until the books are right."""
    async with bench.database() as dsn, await connect_pool(dsn, size=2) as pool:
        await load(pool, [f"S{number:06}" for number in range(securities)], _HELD_BY, dates=5)
        await pool.execute("vacuum analyze")

        async def once() -> float:
            await pool.execute("truncate corrections, outbox_events")
            await pool.execute(_CORRECT_ALL, _LATE)
            await pool.execute("vacuum position_state, daily_position_snapshots, securities, market_prices")
            valuation, keys, right = Valuation(pool, _VALUATION_KEYS), 0, 0
            started = time.perf_counter()
            while (done := await valuation.pass_once()) != Pass():
                keys += done.keys
                right += len(done.right)
            seconds = time.perf_counter() - started
            assert (keys, right) == (securities * _HELD_BY, securities), f"{keys} keys, {right} corrections"
            return seconds / keys * 1e6

        yield once


# -- appends to longer and longer histories -----------------------------------------------------------------------

# A key booked by the sink, copied to as many portfolios as wanted: whatever columns there are.
_COPY_KEYS = """
insert into position_state
select copy.* from position_state s cross join generate_series(1, $1::int) as p
cross join lateral jsonb_populate_record(s, jsonb_build_object('portfolio_id', 'P' || p)) as copy
"""

_COPY_ROWS = """
insert into {table}
select copy.* from {table} t cross join generate_series(1, $1::int) as p
cross join lateral jsonb_populate_record(t, jsonb_build_object(
    'portfolio_id', 'P' || p, 'transaction_id', replace(t.transaction_id, 'P0-', 'P' || p || '-'))) as copy
"""


async def _by_transactions(bench: Bench) -> None:
    keys = bench.size(1_000, 100)
    lengths = [bench.size(full, quick) for full, quick in ((10, 10), (100, 50), (1_000, 200))]
    works = [(n, _appended(bench, keys, n)) for n in lengths]
    note = f"one to each of {keys:,} keys in a batch, purchases and disposals in turn"
    await _compare(bench, "append", "µs per transaction", "transactions of the key", works, note)


@asynccontextmanager
async def _appended(bench: Bench, keys: int, length: int) -> AsyncIterator[Work]:
    """Microseconds per transaction appended to such keys."""
    async with bench.database() as dsn, await connect_pool(dsn, size=2) as pool:
        await _book(pool, [_trade(0, number) for number in range(length)])
        await pool.execute(_COPY_KEYS, keys)
        for table in ("transactions", "position_history"):
            await pool.execute(_COPY_ROWS.format(table=table), keys)
        await pool.execute("vacuum analyze")

        async def once() -> float:
            """A purchase and a disposal for each key, in a batch each; then the histories are as long as before."""
            work = [[_trade(key + 1, number) for key in range(keys)] for number in (length, length + 1)]
            started = time.perf_counter()
            for batch in work:
                await _book(pool, batch)
            seconds = time.perf_counter() - started
            await pool.execute("delete from transactions where transaction_date >= $1", work[0][0].transaction_date)
            await pool.execute("delete from position_history where sequence > $1", length)
            await pool.execute("truncate outbox_events")
            await pool.execute("vacuum transactions, position_history, position_state, securities")
            return seconds / (2 * keys) * 1e6

        yield lambda: _median_of(once, bench.size(_REPEATED, 1))


async def _book(pool: Pool, batch: Sequence[Transaction]) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await positions.apply(connection, list(enumerate(batch)), "FIFO")


def _trade(portfolio: int, number: int) -> Transaction:
    """The number-th of the portfolio, a minute after the one before: purchases of ten and disposals of six."""
    at = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    kind: TransactionType = "SELL" if number % 2 else "BUY"
    quantity = Decimal(6 if kind == "SELL" else 10)
    return Transaction(
        f"P{portfolio}-{number:06}", f"P{portfolio}", _TARGET, at, kind, quantity, Decimal(10), quantity * 10
    )
