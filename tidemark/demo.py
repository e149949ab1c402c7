"""The demo's story: load real prices, correct a late price and a back-dated trade, prove the books."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any, TypeAlias

from aiokafka import AIOKafkaProducer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinks.database import Connection, connect
from sinks.demo_reader import Progress, read_job, read_key, read_progress
from streams.kafka_clients import client_settings
from streams.produce import DATES_KEY
from streams.settings import Settings
from tidemark.audit import audit_books
from tidemark.oracle import Method, fold_inputs
from tidemark.sample import business_dates, generate_transactions, load_prices
from tidemark.sample.prices import MAIN_SECURITY

Event: TypeAlias = tuple[str, dict[str, Any]]
LATE_BY = 15  # business dates before the last, on which the late price and the back-dated trade fall
STEP_SECONDS = 60.0
_POLL_SECONDS = 0.1


class DemoError(Exception):
    """The books did not come right in time; one line says where they stood."""


@dataclass(frozen=True)
class Plan:
    """Everything the demo will send, decided before anything is sent."""

    dates: list[date]
    prices: list[Event]
    transactions: list[Event]
    late_price: Event
    late_trade: Event
    late_date: date
    portfolio: str

    @property
    def events(self) -> list[Event]:
        """All of it, in the order it is sent."""
        return [*self.prices, *self.transactions, *self.closings, self.late_price, self.late_trade]

    @property
    def closings(self) -> list[Event]:
        """The business dates, in order."""
        return [("business-dates", {"business_date": day.isoformat()}) for day in self.dates]


def make_plan(seed: int, portfolios: int, dates: int) -> Plan:
    """The last `dates` sample dates; the main index's close of one of them is held back and comes last of all."""
    days = business_dates()[-dates:]
    late_date = days[max(0, len(days) - 1 - LATE_BY)]
    kept = {day.isoformat() for day in days}
    prices = [("prices", dict(row)) for row in load_prices() if row["price_date"] in kept]
    late = next(event for event in prices if _is_price(event, late_date))
    trades = generate_transactions(seed, portfolios, days)
    portfolio = _example(trades, late_date)
    return Plan(
        dates=days,
        prices=[event for event in prices if event is not late],
        transactions=[("transactions", record) for record in trades],
        late_price=late,
        late_trade=("transactions", _back_dated(portfolio, late_date, Decimal(late[1]["price"]))),
        late_date=late_date,
        portfolio=portfolio,
    )


def _is_price(event: Event, day: date) -> bool:
    return bool(event[1]["security_id"] == MAIN_SECURITY) and event[1]["price_date"] == day.isoformat()


def _example(trades: Sequence[dict[str, Any]], day: date) -> str:
    """The first portfolio that trades the main security both before and after the day; else the first of all."""
    of_security = [record for record in trades if record["security_id"] == MAIN_SECURITY]
    before: set[str] = {r["portfolio_id"] for r in of_security if r["transaction_date"] < day.isoformat()}
    after = {r["portfolio_id"] for r in of_security if r["transaction_date"] > day.isoformat() + "U"}
    return min(before & after or before or {str(record["portfolio_id"]) for record in trades})


def _back_dated(portfolio: str, day: date, price: Decimal) -> dict[str, Any]:
    quantity = Decimal(250)
    return {
        "transaction_id": f"{portfolio}-{MAIN_SECURITY}-LATE",
        "portfolio_id": portfolio,
        "security_id": MAIN_SECURITY,
        "transaction_date": f"{day.isoformat()}T14:30:00Z",
        "transaction_type": "BUY",
        "quantity": str(quantity),
        "price": str(price),
        "gross_transaction_amount": str(quantity * price),
        "trade_fee": "4.95",
        "currency": "USD",
    }


async def play(settings: Settings, plan: Plan, console: Console) -> bool:
    """Run the demo on a stack that is up; returns whether the books agree in the end.

    Raises DemoError when a step does not finish in STEP_SECONDS.
    """
    producer = AIOKafkaProducer(**client_settings(settings), enable_idempotence=True)
    connection = await connect(settings.dsn)
    try:
        await producer.start()
        stage = _Stage(settings, plan, console, producer, connection)
        await stage.load()
        await stage.correct("A late price", plan.late_price, plan.late_date)
        await stage.correct("A back-dated trade", plan.late_trade, plan.dates[-1])
        return await _prove(settings, plan, console)
    finally:
        await producer.stop()
        await connection.close()


async def _prove(settings: Settings, plan: Plan, console: Console) -> bool:
    method: Method = settings.cost_basis_method
    started = time.monotonic()
    result = await audit_books(settings.dsn, method)
    sent = await asyncio.to_thread(lambda: fold_inputs(plan.events).books(method))
    for line in result.differences[:20]:
        console.print(f"  {line}", style="red", markup=False)
    if not result.agrees or result.waiting or result.snapshots != sent.snapshot_count:
        console.print(
            f"{len(result.differences):,} differences; {len(result.waiting):,} keys still wait; "
            f"{result.snapshots:,} snapshots compared, {sent.snapshot_count:,} expected",
            style="bold red",
        )
        return False
    console.print(
        Text.assemble(
            (f"{result.snapshots:,} snapshots of {result.keys:,} keys agree", "bold green"),
            f" with an independent recomputation ({method}, {time.monotonic() - started:.1f} s)",
        )
    )
    return True


@dataclass
class _Stage:
    settings: Settings
    plan: Plan
    console: Console
    producer: AIOKafkaProducer
    connection: Connection
    sent: list[Event] = field(default_factory=list)

    async def load(self) -> None:
        """Send the sample and close its dates."""
        plan, started = self.plan, time.monotonic()
        self.console.rule("Loading the books", align="left")
        await self._send([*plan.prices, *plan.transactions])
        await self._until("records stored", self._all_stored)
        await self._send(plan.closings)
        now = await self._until("positions valued", lambda now: now.dates == len(plan.dates) and _books_right(now))
        self.console.print(
            f"{now.transactions:,} transactions and {now.prices:,} closes of {plan.dates[0]} to {plan.dates[-1]}: "
            f"{now.keys:,} positions valued on {now.dates} dates in {time.monotonic() - started:.1f} s"
        )

    async def correct(self, title: str, event: Event, shown: date) -> None:
        """Send one late record, show the correction until the books are right, then what it changed."""
        self.console.rule(title, align="left")
        self.console.print(self._announce(event))
        before, epochs = await self._key(shown), (await read_progress(self.connection)).epochs
        job_before = await read_job(self.connection, MAIN_SECURITY)
        started = time.monotonic()
        await self._send([event])
        now = await self._until(
            "watermarks back to L", lambda now: self._all_stored(now) and _books_right(now), live=True
        )
        elapsed = time.monotonic() - started
        job = await read_job(self.connection, MAIN_SECURITY)
        if job and job != job_before:
            self.console.print(
                f"job {job['job_id']} {job['status']}: {job['keys_done']:,} of {job['keys_total'] or 0:,} keys "
                f"reset from {job['earliest_impacted_date']}"
            )
        if now.epochs != epochs:
            self.console.print(f"the key's history was rebuilt: {now.epochs - epochs} new epoch")
        after = await self._key(shown)
        self.console.print(_changes(self.plan.portfolio, shown, before, after))
        self.console.print(f"every watermark is at L = {now.latest} again: {elapsed:.2f} s after the record was sent")

    def _announce(self, event: Event) -> str:
        topic, record = event
        if topic == "prices":
            return (
                f"The close of {MAIN_SECURITY} on {record['price_date']}, {record['price']}, arrives when L is "
                f"{self.plan.dates[-1]}; so far that date is valued at the close before."
            )
        return (
            f"{record['portfolio_id']} bought {record['quantity']} {MAIN_SECURITY} at {record['price']} on "
            f"{self.plan.late_date}; the trade is reported now."
        )

    async def _key(self, day: date) -> dict[str, Any]:
        return await read_key(self.connection, self.plan.portfolio, MAIN_SECURITY, day) or {}

    async def _send(self, events: Sequence[Event]) -> None:
        acks = []
        for topic, record in events:
            key = record["security_id"].encode() if "security_id" in record else DATES_KEY
            value = json.dumps(record).encode()
            acks.append(await self.producer.send(self.settings.topic(topic), value, key=key))
        await asyncio.gather(*acks)
        self.sent += events

    def _all_stored(self, now: Progress) -> bool:
        topics = [topic for topic, _ in self.sent]
        return (now.transactions, now.prices) == (topics.count("transactions"), topics.count("prices"))

    async def _until(self, what: str, reached: Callable[[Progress], bool], *, live: bool = False) -> Progress:
        """Poll until reached; on a terminal with a line that keeps changing, else with a line per change."""
        started, last = time.monotonic(), ""
        with self.console.status(what) as status:
            while True:
                now = await read_progress(self.connection)
                text = await self._status(now)
                if live and not self.console.is_terminal and text != last:
                    self.console.print(f"  {time.monotonic() - started:5.2f} s  {text}")
                last = text
                status.update(Text(f"{what}: {text} · {time.monotonic() - started:.1f} s"))
                if reached(now):
                    return now
                if time.monotonic() - started > STEP_SECONDS:
                    raise DemoError(f"{what}: not within {STEP_SECONDS:.0f} s; {text}")
                await asyncio.sleep(_POLL_SECONDS)

    async def _status(self, now: Progress) -> str:
        job = await read_job(self.connection, MAIN_SECURITY)
        parts = []
        if job:
            parts.append(f"job {job['status']}, {job['keys_done']:,}/{job['keys_total'] or 0:,} keys reset")
        parts.append(f"{now.dirty:,} of {now.keys:,} keys to value")
        parts.append(f"{now.behind:,} watermarks behind L")
        return " · ".join(parts)


def _books_right(now: Progress) -> bool:
    return now.latest is not None and not (now.dirty or now.behind or now.corrections)


_COLUMNS = {
    "quantity": "quantity",
    "cost_basis": "cost",
    "price": "price",
    "market_value": "market value",
    "unrealized_gain_loss": "unrealized",
    "valuation_status": "status",
    "epoch": "epoch",
}


def _changes(portfolio: str, day: date, before: dict[str, Any], after: dict[str, Any]) -> Table:
    """One key on one date, before and after; what changed is bold."""
    table = Table("", *_COLUMNS.values(), title=f"{portfolio}, {MAIN_SECURITY}, {day}", title_justify="left")
    table.add_row("before", *(_cell(before.get(name)) for name in _COLUMNS))
    changed = ("bold yellow" if before.get(name) != after.get(name) else "" for name in _COLUMNS)
    cells = (_cell(after.get(name)) for name in _COLUMNS)
    table.add_row("after", *(Text(cell, style) for cell, style in zip(cells, changed, strict=True)))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, Decimal) else str(value)
