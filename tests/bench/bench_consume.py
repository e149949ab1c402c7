"""Consume, decode, fold into state, in one process: the batch transport beside what else one would take.

The same records of the same topic, from its beginning, by each in turn; see tests/bench/peers/.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import uuid
from datetime import date, timedelta
from typing import Any

from confluent_kafka import Producer

from sinks.database import connect
from streams.settings import Settings, load_named
from streams.topics import PRICES, ensure_topics
from tests.bench.harness import Bench
from tests.bench.peers.run import PEERS, PEERS_PYTHON, run_peer

PARTITIONS = 4
_SECURITIES = 1_000
_FIRST_DAY = date(2020, 1, 1)


async def run(bench: Bench) -> None:
    """Every comparison on one topic. What is slow reads fewer records: rates are compared."""
    kafka = await bench.kafka()
    async with bench.database() as dsn:
        settings = load_named(
            broker_url=kafka,
            database_url=dsn,
            data_dir=bench.folder / "consume",
            topic_prefix=f"b{uuid.uuid4().hex[:8]}-",
            input_partitions=PARTITIONS,
        )
        await ensure_topics(settings)
        many, few = bench.size(600_000, 100_000), bench.size(60_000, 10_000)
        send_prices(settings, many)
        peers = Peers(bench, settings)
        name = "consume, decode, fold: batch transport"
        ours = peers.rate("batches", many)
        await bench.compare(name, "records/s", ours, ("bare aiokafka getmany", peers.rate("bare", many)), wanted=0.7)
        stock = peers.rate("stock", few, table=False)
        await bench.compare(name, "records/s", ours, ("stock Faust agent, a dict", stock), wanted=20)
        stock = peers.rate("stock", few, table=True)
        await bench.compare(name, "records/s", ours, ("stock Faust agent, a table", stock), wanted=20)
        if (PEERS / ".installed").exists():
            await bench.compare(
                name, "records/s", ours, ("Quix Streams, stateful", peers.rate("quix", few * 2)), wanted=3
            )
        else:
            bench.say("Quix Streams is left out: run `make peers`")


class Peers:
    """Runs peers on one topic, each time as a new consumer group with a folder of its own."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self._bench = bench
        self._settings = settings

    def rate(self, name: str, records: int, **more: Any) -> Any:
        """A round of the peer: records per second."""

        async def once() -> float:
            folder = tempfile.mkdtemp(dir=self._bench.folder)
            group = uuid.uuid4().hex[:8]
            topic = self._settings.topic(PRICES)
            if name == "batches":  # its group is where its offsets are, so that is what is new
                prefix = self._settings.topic_prefix
                own = {"topic_prefix": prefix, "data_dir": folder, "web_port": 0, "session_timeout_seconds": 6}
                own |= {"broker_url": self._settings.broker, "database_url": self._settings.dsn}
                await forget_offsets(self._settings)
                more["settings"], topic = own, PRICES
            config = {
                "bootstrap": self._settings.bootstrap_servers,
                "topic": topic,
                "records": records,
                "partitions": PARTITIONS,
                "group": group,
                "folder": folder,
                **more,
            }
            try:
                found = await run_peer(name, config, PEERS_PYTHON if name.startswith("quix") else sys.executable)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
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
    producer = Producer({"bootstrap.servers": settings.bootstrap_servers, "linger.ms": 20, "batch.size": 500_000})
    topic = settings.topic(PRICES)
    for number in range(count):
        record = price(number)
        while True:
            try:
                producer.produce(topic, json.dumps(record).encode(), key=record["security_id"].encode())
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0


async def forget_offsets(settings: Settings) -> None:
    """So that the next `intake` worker begins at the logs' beginnings."""
    connection = await connect(settings.dsn)
    try:
        await connection.execute("delete from kafka_offsets where consumer_group = $1", settings.group("intake"))
    finally:
        await connection.close()
