"""The whole topology on real Kafka and Postgres: the examples of semantics.md, bad input, producers, the table view."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.local.postgres import PostgresServer
from deploy.local.stack import Stack
from tests import scenarios
from tests.topology import Event, Topology, by_security, run_topology, unkeyed


@pytest.fixture(scope="module")
async def fifo(kafka: str, postgres: PostgresServer, folder: Path) -> AsyncIterator[Topology]:
    """A topology that the examples share: each has a security of its own."""
    dsn = await postgres.create_database("topology_fifo")
    async with run_topology(kafka, dsn, folder) as topology:
        await topology.send([("business-dates", {"business_date": f"2025-01-{day:02}"}) for day in range(1, 11)])
        await topology.settle()
        yield topology


def trade(security: str, n: int, kind: str, quantity: object, price: object, day: int, **more: Any) -> Event:
    return "transactions", {
        "transaction_id": f"{security}-{n}",
        "portfolio_id": "P",
        "security_id": security,
        "transaction_date": f"2025-01-{day:02}T10:00:00Z",
        "transaction_type": kind,
        "quantity": str(quantity),
        "price": str(price),
        "gross_transaction_amount": str(Decimal(str(quantity)) * Decimal(str(price))),
        **more,
    }


def price(security: str, day: int, value: object) -> Event:
    return "prices", {"security_id": security, "price_date": f"2025-01-{day:02}", "price": value}


async def position(topology: Topology, security: str) -> tuple[Any, ...]:
    """(quantity, cost_basis, realized_gain_loss, epoch, status) after the last transaction."""
    row = await topology.pool.fetchrow(
        """
        select p.quantity, p.cost_basis, p.realized_gain_loss, s.epoch, s.status
        from current_positions p join position_state s using (portfolio_id, security_id)
        where security_id = $1 order by position_date desc limit 1
        """,
        security,
    )
    return tuple(row)


async def test_example_late_sell(fifo: Topology) -> None:
    await fifo.send([trade("E1", 1, "BUY", 100, 200, 1), trade("E1", 2, "BUY", 50, 220, 3)])
    await fifo.settle()
    await fifo.send([trade("E1", 3, "SELL", 40, 215, 2)])
    await fifo.settle()
    assert await position(fifo, "E1") == (110, 23_000, 600, 1, "CURRENT")


async def test_example_two_late_sells(fifo: Topology) -> None:
    await fifo.send([trade("E2", 1, "BUY", 100, 10, 1), trade("E2", 2, "BUY", 50, 12, 4)])
    await fifo.settle()
    for late in (trade("E2", 3, "SELL", 20, 11, 2), trade("E2", 4, "SELL", 30, 11.5, 3)):
        await fifo.send([late])
        await fifo.settle()
    assert await position(fifo, "E2") == (100, 1_100, 65, 2, "CURRENT")


async def test_example_fifo_realizes_250(fifo: Topology) -> None:
    await fifo.send(fifo_or_avco("E3"))
    await fifo.settle()
    assert (await position(fifo, "E3"))[2] == 250


def fifo_or_avco(security: str) -> list[Event]:
    return [
        trade(security, 1, "BUY", 100, 10, 1),
        trade(security, 2, "BUY", 100, 12, 2),
        trade(security, 3, "SELL", 50, 15, 3),
    ]


async def test_example_valuation(fifo: Topology) -> None:
    await fifo.send([price("E4", 1, 110), trade("E4", 1, "BUY", 10, 100, 1)])
    await fifo.settle()
    row = await fifo.pool.fetchrow("select * from current_valuations where security_id = 'E4' and valuation_date = $1",
                                   await fifo.pool.fetchval("select date '2025-01-01'"))  # fmt: skip
    assert (row["market_value"], row["unrealized_gain_loss"], row["valuation_status"]) == (1_100, 100, "VALUED_CURRENT")


async def test_an_amendment_a_cancellation_and_a_late_price(fifo: Topology) -> None:
    await fifo.send([price("E5", 1, 10), trade("E5", 1, "BUY", 10, 10, 1), trade("E5", 2, "BUY", 5, 10, 2)])
    await fifo.settle()
    await fifo.send([trade("E5", 1, "BUY", 20, 10, 1, revision=1), price("E5", 2, 11)])
    await fifo.settle()
    await fifo.send([trade("E5", 2, "BUY", 5, 10, 2, revision=4, cancelled=True)])
    await fifo.settle()
    assert await position(fifo, "E5") == (20, 200, 0, 2, "CURRENT")
    rows = await fifo.pool.fetch(
        "select price, market_value from daily_position_snapshots where security_id = 'E5' order by valuation_date"
    )
    assert [tuple(row) for row in rows] == [(10, 200)] + [(11, 220)] * 9


BAD = {
    b"{": ("transactions", "malformed"),
    b"\xff\xfe": ("prices", "malformed"),
    b'{"security_id": "B", "price_date": "2025-01-01", "price": 0}': ("prices", "invalid"),
    b'{"security_id": "", "price_date": "2025-01-01", "price": 1}': ("prices", "invalid"),
    b'{"security_id": "B", "price_date": "1899-12-31", "price": 1}': ("prices", "invalid"),
    b'{"security_id": "B", "price_date": "2025-01-01", "price": 1, "revision": "1"}': ("prices", "invalid"),
    b'{"security_id": "B", "price_date": "2025-01-01", "price": 1e18}': ("prices", "invalid"),
    b'{"business_date": "2025-02-30"}': ("business-dates", "invalid"),
    json.dumps({**trade("B", 1, "SPLIT", 0, 0, 1)[1]}).encode(): ("transactions", "invalid"),
    json.dumps({**trade("B", 2, "GIFT", 1, 1, 1)[1]}).encode(): ("transactions", "invalid"),
    json.dumps({**trade("B", 3, "BUY", 1, 1, 1)[1], "portfolio_id": "x" * 201}).encode(): ("transactions", "invalid"),
    json.dumps({**trade("B", 4, "BUY", 1, 1, 1)[1], "portfolio_id": "a\u0007"}).encode(): ("transactions", "invalid"),
    b'{"note": "' + b"x" * 1_100_000 + b'"}': ("transactions", "too_large"),
}


async def test_bad_input_goes_to_dead_letters_and_the_partition_moves_on(fifo: Topology) -> None:
    bad: list[Event] = [(topic, value) for value, (topic, _) in BAD.items()]
    bad += [("transactions", None), ("prices", None)]
    good = [trade("E6", n, "BUY", 1, 1, 1) for n in range(1, 9)]
    conflicting = trade("E6", 1, "BUY", 2, 1, 1)
    mixed = bad + good
    random.Random(6).shuffle(mixed)
    await fifo.send(mixed)
    await fifo.settle()
    await fifo.send([conflicting, good[0]])
    await fifo.settle()
    assert (await position(fifo, "E6"))[0] == 8
    letters = await fifo.read("dead-letters")
    headers = [{name: value.decode() for name, value in letter.headers} for letter in letters]
    expected = Counter(BAD.values()) + Counter(
        [("transactions", "malformed"), ("prices", "malformed"), ("transactions", "conflicting_duplicate")]
    )
    prefix = fifo.settings.topic_prefix
    assert Counter((h["topic"].removeprefix(prefix), h["reason"]) for h in headers) == expected
    for letter, header in zip(letters, headers, strict=True):
        assert header.keys() - {"truncated"} == {"reason", "detail", "topic", "partition", "offset", "event_id"}
        if letter.value is not None and "truncated" not in header and header["reason"] != "conflicting_duplicate":
            assert letter.value in BAD
    assert [h["truncated"] for h in headers if "truncated" in h] == ["1100012"]


async def test_every_triggers_worker_answers_for_every_key(fifo: Topology, folder: Path) -> None:
    securities = [f"W{n}" for n in range(12)]
    await fifo.send([price(s, 1, 10) for s in securities] + [trade(s, 1, "BUY", 1, 10, 1) for s in securities])
    await fifo.settle()
    await fifo.pool.execute("insert into reset_limit (rows_per_second) values (10000) on conflict do nothing")
    second = Stack(fifo.settings.model_copy(update={"data_dir": folder / "second"}), roles=["triggers"])
    await second.start()
    try:
        async with aiohttp.ClientSession() as web:  # it has not produced anything yet
            assert await _json(web, f"{second.worker_url('triggers')}/router/triggers/W0/")
        await fifo.pool.execute("update reset_limit set paused = true")
        await fifo.send([price(s, 5, 11) for s in securities])
        urls = [fifo.stack.worker_url("triggers"), second.worker_url("triggers")]
        async with aiohttp.ClientSession() as web:
            await _all_in_flight(web, urls[0], set(securities))
            routes = {await _json(web, f"{urls[0]}/router/triggers/{s}/") for s in securities}
            assert routes == set(urls)  # the keys are spread: each worker must forward some
            for url in urls:
                assert {e["security_id"] for e in await _json(web, f"{url}/api/triggers")} == set(securities)
                for security in securities:
                    entry = await _json(web, f"{url}/api/triggers/{security}")
                    assert entry["security_id"] == security
                    assert entry["in_flight"]["earliest_impacted_date"] == "2025-01-05"
                    assert "in_flight" in await _json(web, f"{url}/table/triggers/{security}/")
            await fifo.pool.execute("update reset_limit set paused = false")
            await fifo.settle()
            for url in urls:
                await _all_in_flight(web, url, set())
                async with web.get(f"{url}/api/triggers/W0") as response:
                    assert response.status == 404
                for path in ("/healthz", "/readyz", "/metrics"):
                    async with web.get(url + path) as response:
                        assert response.status == 200
    finally:
        await fifo.pool.execute("update reset_limit set paused = false")
        await second.stop()


async def _all_in_flight(web: aiohttp.ClientSession, url: str, securities: set[str]) -> None:
    """Until just these are in flight: a worker that joins first gets its partitions."""
    seen: Any = None
    try:
        async with asyncio.timeout(120):
            while seen != securities:
                await asyncio.sleep(0.1)
                async with web.get(f"{url}/api/triggers") as response:
                    seen = {e["security_id"] for e in await response.json()} if response.status == 200 else None
    except TimeoutError:
        raise AssertionError(f"in flight: {seen}, expected {securities}") from None


async def _json(web: aiohttp.ClientSession, url: str) -> Any:
    async with web.get(url) as response:
        assert response.status == 200, await response.text()
        return await response.json(content_type=None)


async def test_the_examples_books_equal_the_oracles(fifo: Topology) -> None:
    audit = await fifo.audit()
    assert (audit.differences, audit.waiting) == ([], [])
    assert audit.snapshots > 0


async def test_2500_events_in_random_order_under_avco(
    kafka: str, empty_database: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Duplicates, amendments, late prices, calendar repairs; the AVCO example with them."""
    seed = 20250901
    print(f"seed {seed}")
    events = scenarios.generate(seed, events=2_500)
    assert len(events) >= 2_000
    async with run_topology(kafka, empty_database, folder, cost_basis_method="AVCO") as topology:
        for first in range(0, len(events), 250):  # in pieces, so that what is late is late for the engine as well
            await topology.send(events[first : first + 250])
            if first % 500 == 0:
                await topology.settle()
        await topology.send(fifo_or_avco("EXAMPLE"))
        await topology.settle()
        assert (await position(topology, "EXAMPLE"))[2] == 200
        audit = await topology.audit()
        assert (audit.differences, audit.waiting) == ([], []), f"seed {seed}"
        expected = scenarios.expected_books([*events, *fifo_or_avco("EXAMPLE")], "AVCO")
        assert audit.snapshots == expected.snapshot_count > 500
        corrected = await topology.pool.fetch("select reason, count(*) from corrections group by 1")
        assert {row["reason"] for row in corrected} >= {"price", "transaction", "calendar"}


@pytest.mark.parametrize(
    ("partitions", "client", "key"),
    [(1, "aiokafka", by_security), (3, "librdkafka", by_security), (5, "librdkafka", unkeyed)],
    ids=["one partition", "librdkafka", "unkeyed"],
)
async def test_producers_and_partitions_do_not_matter(
    kafka: str, empty_database: str, folder: Path, partitions: int, client: str, key: Any
) -> None:
    events = scenarios.generate(7, events=350)
    async with run_topology(kafka, empty_database, folder, input_partitions=partitions) as topology:
        if client == "librdkafka":
            topology.send_with_librdkafka(events, key)
        else:
            await topology.send(events, key)
        await topology.settle()
        audit = await topology.audit()
        assert (audit.differences, audit.waiting) == ([], [])
        expected = scenarios.expected_books(events)
        assert (audit.keys, audit.snapshots) == (len(expected.history), expected.snapshot_count)
