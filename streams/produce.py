"""Sending files of records: CSV or JSON lines, every record validated before the first is sent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from streams import records, topics
from streams.kafka_clients import client_settings
from streams.records import Rejected
from streams.settings import Settings
from streams.topics import TopicError

_IN_FLIGHT = 2_000

_DECODERS: dict[str, Callable[[bytes], object]] = {
    topics.BUSINESS_DATES: records.decode_business_date,
    topics.PRICES: records.decode_price,
    topics.TRANSACTIONS: records.decode_transaction,
}
INPUT_TOPICS = tuple(_DECODERS)

DATES_KEY = b"business-dates"
"""The key of every business date: one partition keeps them in the order in which they were sent."""


@dataclass(frozen=True, slots=True)
class Line:
    """One record of a file, ready to be sent. problem: why it would be refused."""

    number: int
    key: bytes | None
    value: bytes
    problem: str | None


def read_lines(topic: str, text: bytes, *, is_csv: bool) -> Iterator[Line]:
    """The records of a file with line numbers. Blank lines are skipped."""
    for number, value in _csv_values(text) if is_csv else _json_values(text):
        try:
            _DECODERS[topic](value)
            problem = None
        except Rejected as error:
            problem = f"{error.reason}: {error.detail}"
        yield Line(number, None if problem else _key(topic, value), value, problem)


async def send(settings: Settings, topic: str, lines: Iterable[Line], on_sent: Callable[[int], None]) -> int:
    """Send the lines in order, keyed by security, dates alike; returns how many the broker has acknowledged.

    Raises TopicError when the broker cannot be reached or refuses a record.
    """
    producer = AIOKafkaProducer(
        **client_settings(settings), acks="all", enable_idempotence=True, max_request_size=2 * records.LARGEST_RECORD
    )
    waiting: list[Any] = []
    sent = 0
    try:
        await producer.start()
        for line in lines:
            waiting.append(await producer.send(settings.topic(topic), line.value, key=line.key))
            if len(waiting) >= _IN_FLIGHT:
                sent += await _acknowledged(waiting, on_sent)
        sent += await _acknowledged(waiting, on_sent)
    except (KafkaError, OSError) as error:
        raise TopicError(f"{settings.topic(topic)} at {settings.bootstrap_servers}: {error}; {sent} sent") from error
    finally:
        await producer.stop()
    return sent


async def _acknowledged(waiting: list[Any], on_sent: Callable[[int], None]) -> int:
    count = len(waiting)
    for acked in waiting:
        await acked
    waiting.clear()
    on_sent(count)
    return count


def _key(topic: str, value: bytes) -> bytes | None:
    if topic == topics.BUSINESS_DATES:
        return DATES_KEY
    security_id = json.loads(value).get("security_id")
    return security_id.encode() if security_id else None


def _json_values(text: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _csv_values(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Columns are fields; an empty cell is a field left out. Numbers stay text, so that no digit is lost."""
    rows = csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""))
    for row in rows:
        fields = {name: value for name, value in row.items() if name and value not in (None, "")}
        typed = {name: _TYPED.get(name, str)(value) for name, value in fields.items()}
        yield rows.line_num, json.dumps(typed).encode()


def _integer(text: str) -> int | str:
    return int(text) if text.strip().lstrip("-").isdigit() else text


def _boolean(text: str) -> bool | str:
    return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), text)


_TYPED: dict[str, Callable[[str], object]] = {"revision": _integer, "cancelled": _boolean}
