"""Consume, decode, fold into state, in one process: the batch transport beside what else one would take.

The same records of the same topic, from its beginning, by each in turn; see tests/bench/peers/.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from datetime import date, timedelta
from typing import Any

from sinks.database import open_connection
from streams.settings import Settings
from streams.topics import PRICES
from tests.bench.harness import Bench, Work
from tests.bench.peers.run import PEERS, PEERS_PYTHON, run_peer
from tests.bench.sending import send

_SECURITIES = 1_000
_FIRST_DAY = date(2020, 1, 1)


async def run(bench: Bench) -> None:
    """Every comparison on one topic. What is slow reads fewer records: rates are compared."""
    async with bench.database() as dsn:
        settings = await bench.settings(dsn)
        many, few = bench.size(600_000, 40_000), bench.size(60_000, 2_000)
        send_prices(settings, many)
        peers = Peers(bench, settings)
        others: list[tuple[str, Work, float]] = [
            ("bare aiokafka getmany", peers.rate("bare", many), 0.7),
            ("stock Faust agent, a dict", peers.rate("stock", few, table=False), 20),
            ("stock Faust agent, a table", peers.rate("stock", few, table=True), 20),
        ]
        if (PEERS / ".installed").exists():
            others.append(("Quix Streams, stateful", peers.rate("quix", few * 2), 3))
        else:
            bench.say("Quix Streams is left out: run `make peers`")
        name = "consume, decode, fold: batch transport"
        await bench.compare_with_each(name, "records/s", peers.rate("batches", many), others)


class Peers:
    """Runs peers on one topic, each time as a new consumer group with a folder of its own."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self._bench = bench
        self._settings = settings

    def rate(self, name: str, records: int, **more: Any) -> Work:
        """A round of the peer: records per second."""
        settings = self._settings

        async def once() -> float:
            await forget_offsets(settings)
            with tempfile.TemporaryDirectory(dir=self._bench.folder, ignore_cleanup_errors=True) as folder:
                config = {
                    "bootstrap": settings.bootstrap_servers,
                    "topic": settings.topic(PRICES),
                    "records": records,
                    "partitions": settings.input_partitions,
                    "group": uuid.uuid4().hex[:8],
                    "folder": folder,
                    "settings": {
                        "broker_url": settings.broker,
                        "database_url": settings.dsn,
                        "topic_prefix": settings.topic_prefix,
                        "data_dir": folder,
                        "web_port": 0,
                        "session_timeout_seconds": 6,
                    },
                    **more,
                }
                found = await run_peer(name, config, PEERS_PYTHON if name.startswith("quix") else sys.executable)
            return float(found["records"] / found["seconds"])

        return once


def price(number: int) -> dict[str, Any]:
    """The number-th: each of a security and date of its own."""
    day, security = divmod(number, _SECURITIES)
    return {
        "security_id": f"SEC{security:05d}",
        "price_date": (_FIRST_DAY + timedelta(days=day)).isoformat(),
        "price": f"{100 + number % 977}.{number % 89:02d}",
        "currency": "USD",
        "revision": 0,
    }


def send_prices(settings: Settings, count: int) -> None:
    """Produce that many, spread over the partitions by their security."""
    records = (price(number) for number in range(count))
    send(settings, PRICES, ((record["security_id"], json.dumps(record).encode()) for record in records))


async def forget_offsets(settings: Settings) -> None:
    """So that the next `intake` worker begins at the logs' beginnings; its group is where its offsets are."""
    async with open_connection(settings.dsn) as connection:
        await connection.execute("delete from kafka_offsets where consumer_group = $1", settings.group("intake"))
