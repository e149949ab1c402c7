"""Postgres that is restarted, promoted or restored while records flow: nothing is numbered twice, consumers are right.

TIDEMARK_TEST_SEEDS: how many different runs of the failovers there are, instead of one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sinks import generation as gate
from sinks.database import connect
from streams import topics
from streams.settings import Settings
from tests import consumed
from tests.reading import read_all
from tests.replicas import Replica, address, is_gone, replicas
from tests.topology import Event, Topology, run_stack, settings_for, until

SEEDS = range(int(os.environ.get("TIDEMARK_TEST_SEEDS", "1")))
_DAYS = [f"2025-01-{day:02}" for day in range(2, 12)]


class Inputs:
    """Records without end: new positions, back-dated trades, prices that change and change back."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self._trades = self._revisions = 0

    def calendar(self) -> list[Event]:
        """The dates, and a price for each security on the first of them."""
        return [
            *(("business-dates", {"business_date": day}) for day in _DAYS),
            *(self.price(security, _DAYS[0], 10) for security in ("A", "B", "C", "Z")),
            self.price("Z", _DAYS[-1], 10),
            self.trade("P0", "Z"),
        ]

    def price(self, security: str, day: str, price: int) -> Event:
        self._revisions += 1
        record = {"security_id": security, "price_date": day, "price": price, "revision": self._revisions}
        return "prices", record

    def trade(self, portfolio: str, security: str = "") -> Event:
        self._trades += 1
        return "transactions", {
            "transaction_id": f"t{self._trades}", "portfolio_id": portfolio,
            "security_id": security or self.chance.choice("ABC"),
            "transaction_date": f"{self.chance.choice(_DAYS)}T10:00:00Z", "transaction_type": "BUY",
            "quantity": self.chance.randint(1, 9), "price": 10,
        }  # fmt: skip

    def some(self, count: int, new: str = "") -> list[Event]:
        """new: a name for portfolios that nobody has seen yet."""
        found: list[Event] = []
        for _ in range(count):
            if self.chance.random() < 0.5:
                portfolio = f"{new or 'P'}{self.chance.randint(0, 5)}"
                found.append(self.trade(portfolio if self.chance.random() < 0.5 else f"P{self.chance.randint(0, 5)}"))
            else:
                found.append(
                    self.price(self.chance.choice("ABC"), self.chance.choice(_DAYS), self.chance.randint(8, 12))
                )
        return found


async def ask(dsn: str, query: str) -> int:
    connection = await connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def generation(dsn: str) -> int:
    return await ask(dsn, "select generation from installation")


async def rounds(dsn: str) -> int:
    return await ask(dsn, "select coalesce(max(round), 0) from relay_rounds")


async def flow(topology: Topology, inputs: Inputs, stop: asyncio.Event) -> None:
    """Records, a few at a time, until told to stop."""
    while not stop.is_set():
        await topology.send(inputs.some(inputs.chance.randint(1, 6)))
        await asyncio.sleep(0.05)


@asynccontextmanager
async def flowing(topology: Topology, inputs: Inputs) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(flow(topology, inputs, stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def some_rounds(replica: Replica, name: str, count: int) -> None:
    """Wait until the relay has published so many times more."""
    dsn = replica.server.url(name)
    before = await rounds(dsn)

    async def are_over() -> bool:
        return await rounds(dsn) >= before + count

    await until(are_over, f"{count} rounds of the relay")


async def settled(topology: Topology) -> None:
    """Settle with patience for connections that a failover has ended."""
    await until(lambda: _answers(topology), "the database")
    await topology.settle()


async def _answers(topology: Topology) -> bool:
    try:
        return bool(await topology.pool.fetchval("select instance = this_instance() from installation"))
    except Exception:
        return False


async def is_told(settings: Settings, price: int) -> bool:
    """Whether a valuation at the price has been published."""
    log, _ = await read_all(settings, topics.VALUATIONS)
    return any(json.loads(message.value)["price"] == price for message in log)


async def says(topology: Topology, role: str, words: str) -> bool:
    """Whether a worker's log has the words."""
    return words in (topology.settings.data_dir / "logs" / f"{role}.log").read_text()


@asynccontextmanager
async def unconfirmed(replica: Replica, name: str) -> AsyncIterator[None]:
    """Nobody can confirm the server's database for a while."""
    connection = await connect(replica.server.url(name))
    try:
        await connection.execute("select pg_advisory_lock($1)", gate.LOCK)  # a standby grants it, and keeps it
        yield
    finally:
        await connection.close()


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_restart_and_failovers_under_load(kafka: str, folder: Path, seed: int) -> None:
    """A restart, a failover to a synchronous standby, and one to an asynchronous standby that lacks commits."""
    inputs = Inputs(seed)
    async with replicas(folder / f"replicas{uuid.uuid4().hex[:6]}", 3) as (first, second, third):
        await first.server.create_database("books")
        settings = settings_for(
            kafka, address([first, second, third], "books"), folder, repair_after_seconds=3, internal_partitions=2
        )
        async with run_stack(settings, may_restart=True) as topology:
            await topology.send(inputs.calendar() + inputs.some(40))
            await topology.settle()

            async with flowing(topology, inputs):
                await first.restart()
                await some_rounds(first, "books", 5)
            await settled(topology)
            assert await generation(settings.dsn) == 0

            await second.copy_from(first)
            await _wait_for_standby(first)
            async with flowing(topology, inputs):
                await some_rounds(first, "books", inputs.chance.randint(3, 20))
                first.kill()
                await is_gone(first.part)
                await second.promote()
                await _answering(topology)
                await some_rounds(second, "books", 3)
            await settled(topology)
            assert await generation(settings.dsn) == 0

            await third.copy_from(second)
            before = await rounds(second.server.url("books"))
            sender = await second.cut_off()
            await topology.send(inputs.some(30, new="N"))  # positions that the standby never hears of
            async with flowing(topology, inputs):
                await some_rounds(second, "books", inputs.chance.randint(5, 30))
            await topology.send([inputs.price("Z", _DAYS[-1], 99)])
            await until(lambda: is_told(settings, 99), "a valuation that is lost then")
            second.kill(sender)
            await is_gone(second.part)
            await topology.send([inputs.price("Z", _DAYS[-1], 10)])  # as it was: nobody would tell of it again
            async with flowing(topology, inputs):
                async with unconfirmed(third, "books"):
                    await third.promote()
                    assert await rounds(third.server.url("books")) <= before + 1
                    await until(lambda: says(topology, "intake", "no worker has confirmed"), "a sink at the gate")
                await _answering(topology)
                await some_rounds(third, "books", 3)
            await settled(topology)
            assert await generation(settings.dsn) == 1
            (lost,) = await topology.pool.fetch("select keys, jobs, lost_round - round as rounds from generations")
            assert min(lost) > 0, "nothing was lost: this test has shown nothing"
            assert (await topology.audit()).differences == []
            assert await consumed.check(settings, topology.pool, inputs.chance) == []


async def _wait_for_standby(primary: Replica) -> None:
    connection = await connect(primary.server.url("postgres"))
    try:
        await connection.execute("alter system set synchronous_standby_names = '*'")
        await connection.execute("select pg_reload_conf()")

        async def is_synchronous() -> bool:
            return await connection.fetchval("select sync_state = 'sync' from pg_stat_replication") is True

        await until(is_synchronous, "a synchronous standby")
    finally:
        await connection.close()


async def _answering(topology: Topology) -> None:
    await until(lambda: _answers(topology), "a database that is confirmed")
