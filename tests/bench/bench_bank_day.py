"""A bank's day: 1,000 portfolios with 100 transactions each and the closing of the date, to all books right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.harness import Bench, Result
from tests.topology import Event, run_topology

_SECURITIES = 100


async def run(bench: Bench) -> None:
    """From the first record sent to the last key valued, on the whole topology: one worker of each role."""
    portfolios = bench.size(1_000, 30)
    kafka = await bench.kafka()
    seconds: list[float] = []
    for number in range(1 if bench.quick else min(3, bench.rounds)):
        async with bench.database(migrated=False) as dsn:
            folder = Path(bench.folder / f"bank-day-{number}")
            async with run_topology(kafka, dsn, folder, input_partitions=4, internal_partitions=4) as topology:
                events = _day(portfolios)
                started = time.perf_counter()
                await topology.send(events)
                await topology.settle()
                seconds.append(time.perf_counter() - started)
                snapshots = await topology.pool.fetchval("select count(*) from daily_position_snapshots")
    assert snapshots == portfolios * _SECURITIES
    bench.add(
        Result(
            f"bank day: {portfolios:,} portfolios x {_SECURITIES} transactions, closing, to all books right",
            "seconds",
            seconds,
            note=f"{snapshots:,} snapshots",
            less=True,
        )
    )


def _day(portfolios: int) -> list[Event]:
    prices: list[Event] = [("prices", _price(security)) for security in range(_SECURITIES)]
    trades: list[Event] = [
        ("transactions", _trade(portfolio, security))
        for portfolio in range(portfolios)
        for security in range(_SECURITIES)
    ]
    return [*prices, *trades, ("business-dates", {"business_date": "2025-09-01"})]


def _price(security: int) -> dict[str, Any]:
    return {"security_id": f"S{security:03}", "price_date": "2025-09-01", "price": f"{100 + security}.25"}


def _trade(portfolio: int, security: int) -> dict[str, Any]:
    return {
        "transaction_id": f"T{portfolio:05}-{security:03}",
        "portfolio_id": f"P{portfolio:05}",
        "security_id": f"S{security:03}",
        "transaction_date": "2025-09-01T10:00:00Z",
        "transaction_type": "BUY",
        "quantity": "10",
        "price": "100",
        "gross_transaction_amount": "1000",
        "trade_fee": "1.5",
    }
