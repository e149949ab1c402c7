"""A trigger table restored from its changelog into an empty data directory, beside stock Faust's replay of it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import uuid
from typing import Any

from confluent_kafka import Producer

from streams import topics
from streams.settings import Settings, load_named
from streams.topics import ensure_topics
from tests.bench.harness import Bench
from tests.bench.peers.run import run_peer

PARTITIONS = 4
_VALUE = (
    '{{"in_flight":{{"job_id":{n},"security_id":"SEC{n:07d}","earliest_impacted_date":"2025-03-03","seq":{n},'
    '"created_at":"2025-11-26T10:00:00Z","job_type":"RESET_WATERMARKS"}},"pending":null}}'
)


async def run(bench: Bench) -> None:
    """Each key once, as after compaction."""
    kafka, count = await bench.kafka(), bench.size(100_000, 10_000)
    async with bench.database() as dsn:
        settings = load_named(
            broker_url=kafka,
            database_url=dsn,
            topic_prefix=f"b{uuid.uuid4().hex[:8]}-",
            internal_partitions=PARTITIONS,
            session_timeout_seconds=6,
        )
        await ensure_topics(settings)
        _fill(settings, count)
        rate = _Restores(bench, settings, count).rate
        await bench.compare(
            "table restored from its changelog", "records/s", rate(False), ("stock Faust", rate(True)), wanted=5
        )


class _Restores:
    def __init__(self, bench: Bench, settings: Settings, count: int) -> None:
        self._bench = bench
        self._settings = settings
        self._count = count

    def rate(self, stock: bool) -> Any:
        """A round: records per second, from the worker's start of recovery to its end."""

        async def once() -> float:
            folder = tempfile.mkdtemp(dir=self._bench.folder)
            own = {"topic_prefix": self._settings.topic_prefix, "data_dir": folder, "internal_partitions": PARTITIONS}
            own |= {"broker_url": self._settings.broker, "database_url": self._settings.dsn}
            own |= {"session_timeout_seconds": 6}
            config = {"settings": own, "stock": stock, "records": self._count}
            try:
                found = await run_peer("restore", config, sys.executable)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return float(found["records"] / found["seconds"])

        return once


def _fill(settings: Settings, count: int) -> None:
    producer = Producer({"bootstrap.servers": settings.bootstrap_servers, "linger.ms": 20})
    topic = topics.changelog(settings)
    for n in range(count):
        producer.produce(topic, _VALUE.format(n=n).encode(), key=f"SEC{n:07d}".encode(), partition=n % PARTITIONS)
        producer.poll(0)
        if n % 50_000 == 0:
            producer.flush(60)
    assert producer.flush(60) == 0
