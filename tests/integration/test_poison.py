"""The last line: a record that no worker survives becomes a dead letter, and whatever fails for all condemns none."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from aiokafka import AIOKafkaProducer

from deploy.local.stack import Stack
from sinks.database import connect
from streams.settings import Settings
from tests.topology import settings_for, until

_POISON = ["7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7"]


def stack_of(settings: Settings, *sabotages: str, roles: Sequence[str] = ("intake",)) -> Stack:
    program = [sys.executable, "-m", "tests.chaos.sabotage", ",".join(sabotages)] if sabotages else None
    return Stack(settings, roles=roles, **({"program": program} if program else {}))


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[asyncpg.Connection]:
    """The stack, and a connection of ours."""
    await stack.start()
    connection = await connect(stack.settings.dsn)
    try:
        yield connection
    finally:
        await connection.close()
        await stack.stop()


async def send(settings: Settings, prices: Sequence[str], partition: int = 0) -> None:
    """A price for each security, in order."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    await producer.start()
    for number, price in enumerate(prices):
        value = {"security_id": f"S{partition}-{number}-{price}", "price_date": "2025-01-02", "price": price}
        await producer.send(settings.topic("prices"), json.dumps(value).encode(), partition=partition)
    await producer.stop()


_ISSUE = """
insert into corrections (seq, security_id, earliest_date, reason) values ($1, $2, '2025-01-02', 'price')
"""
_STORED = "select next_offset from kafka_offsets where topic like '%prices' and partition = $1"


async def letters(connection: asyncpg.Connection) -> list[Any]:
    """The dead letters, which no relay takes away here."""
    return await connection.fetch(
        """
        select headers ->> 'reason' as reason, headers ->> 'detail' as detail,
               convert_from(value, 'UTF8')::json ->> 'price' as price
        from outbox_events where topic = 'dead-letters' order by (headers ->> 'offset')::bigint
        """
    )


async def reaches(connection: asyncpg.Connection, offset: int, partition: int = 0) -> None:
    """Wait until the partition's stored offset is there."""

    async def there() -> bool:
        return bool(await connection.fetchval(_STORED, partition) == offset)

    await until(there, f"offset {offset} of partition {partition}", seconds=240)


async def test_each_poisonous_record_becomes_a_letter_and_all_others_are_applied(
    kafka: str, database: str, folder: Path
) -> None:
    settings = settings_for(kafka, database, folder, poison_attempts=2, trial_seconds=10, trial_memory_mb=768)
    prices = ["1", "1", *(price for poison in _POISON for price in (poison, "1")), "1"]
    stack = stack_of(settings, "poisonous")
    async with running(stack) as connection:
        await send(settings, prices)

        async def in_trial() -> bool:
            return bool(await connection.fetchval("select true from suspects limit 1"))

        await until(in_trial, "a trial")
        restarts = stack.restarts
        await send(settings, ["2"] * 50, partition=1)
        await reaches(connection, 50, partition=1)
        assert await connection.fetchval(_STORED, 0) < len(prices), "partition 1 went on meanwhile"
        await reaches(connection, len(prices))
        found = await letters(connection)
        assert [(letter["reason"], letter["price"]) for letter in found] == [("poison", price) for price in _POISON]
        for letter, words in zip(
            found, ["a bug", "status 3", "SIGKILL", "MemoryError", "longer than 10 s", "clos", "timeout"], strict=True
        ):
            assert words in letter["detail"]
        stored = await connection.fetchval("select count(*) from market_prices")
        assert stored == 50 + len(prices) - len(_POISON)

        await send(settings, ["3"] * 5)  # the worker itself reads on
        await reaches(connection, len(prices) + 5)
        assert stack.restarts == restarts
        assert await connection.fetchval("select count(*) from suspects where condemned_at is null") == 0


async def test_what_fails_for_every_record_condemns_none(kafka: str, database: str, folder: Path) -> None:
    """A program whose effect is broken, one whose decoder is, and a database without the table; then all is well."""
    settings = settings_for(kafka, database, folder, poison_attempts=2, input_partitions=1, trial_seconds=15)
    tried = 0

    async def is_in_vain(connection: asyncpg.Connection) -> None:
        nonlocal tried
        tried += 3

        async def others_tried() -> bool:
            return (await connection.fetchval("select max(neighbours) from suspects") or 0) >= tried

        await until(others_tried, "the trial of three other records", seconds=240)
        assert await connection.fetchval("select max(deaths) from suspects") == 0
        assert await connection.fetchval(_STORED, 0) == 0

    async with running(stack_of(settings, "broken_effect")) as connection:
        await send(settings, ["1"] * 6)
        await is_in_vain(connection)
    async with running(stack_of(settings, "broken_decoder")) as connection:
        await is_in_vain(connection)
        await connection.execute("alter table market_prices rename to elsewhere")
    async with running(stack_of(settings)) as connection:
        await is_in_vain(connection)
        await connection.execute("alter table elsewhere rename to market_prices")
        await reaches(connection, 6)
        assert await connection.fetchval("select count(*) from market_prices") == 6
        assert await letters(connection) == []
        assert await connection.fetchval("select count(*) from suspects where condemned_at is not null") == 0


async def test_so_many_verdicts_an_hour_and_no_more(kafka: str, database: str, folder: Path) -> None:
    settings = settings_for(kafka, database, folder, poison_attempts=2, poison_verdicts_per_hour=1, input_partitions=1)
    async with running(stack_of(settings, "poisonous")) as connection:
        await send(settings, ["7.1", "1", "7.1", "1", "1"])
        log = settings.data_dir / "logs" / "intake.log"

        async def stopped() -> bool:
            return "1 records were condemned within an hour" in log.read_text()

        await until(stopped, "the stop at the second", seconds=240)
        assert await connection.fetchval(_STORED, 0) == 2
        assert len(await letters(connection)) == 1


async def test_a_job_that_no_worker_survives_is_passed_over(kafka: str, database: str, folder: Path) -> None:
    settings = settings_for(kafka, database, folder, poison_attempts=2, internal_partitions=1)
    stack = stack_of(settings, "poisonous_jobs", roles=["resets"])
    async with running(stack) as connection:
        producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
        await producer.start()
        for job_id, security in enumerate(["A", "POISON", "B"], 1):
            await connection.execute(_ISSUE, job_id, security)
            job = {
                "job_id": job_id, "security_id": security, "earliest_impacted_date": "2025-01-02", "seq": job_id,
                "created_at": "2025-01-02T00:00:00Z",
            }  # fmt: skip
            headers = [("job_id", str(job_id).encode())]
            await producer.send_and_wait(
                settings.topic("reprocessing-jobs"), json.dumps(job).encode(), key=security.encode(), headers=headers
            )
        await producer.stop()

        async def passed() -> bool:
            return await connection.fetchval("select next_offset from kafka_offsets") == 3

        await until(passed, "the end of the log", seconds=240)
        jobs = await connection.fetch("select security_id, status from reprocessing_jobs order by job_id")
        assert [tuple(job) for job in jobs] == [("A", "COMPLETE"), ("B", "COMPLETE")]
        assert await connection.fetchval("select record_offset from suspects where condemned_at is not null") == 1

        async def trial_is_over() -> bool:
            async with aiohttp.ClientSession() as web, web.get(f"{stack.worker_url('resets')}/metrics") as answer:
                text = await answer.text()
            assert 'dead_letters_total{reason="poison",topic="reprocessing-jobs"} 1.0' in text
            return 'partitions_in_trial{topic="reprocessing-jobs"} 0.0' in text

        await until(trial_is_over, "the end of the trial")
