"""What a worker reads ahead is bounded: in bytes of records on their way, and in jobs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from sinks.batches import Batch, bytes_of
from streams import herd
from streams.client_thread import ClientThread
from streams.herd import Herd
from streams.transport import BatchConsumer, BatchLimits

MIB = 2**20


def record(offset: int, size: int = 1, key: bytes | None = None, headers: Any = ()) -> Any:
    return SimpleNamespace(offset=offset, key=key, value=b"x" * size, headers=headers)


def batch(start: int, *sizes: int) -> Batch:
    return Batch("jobs", 0, 1, start, [record(start + number, size) for number, size in enumerate(sizes)])


@pytest.mark.parametrize(
    ("sizes", "count", "taken"),
    [
        ((1, 1, 1), 2, 2),
        ((1, 1, 1), 9, 3),
        ((MIB, MIB, MIB), 9, 2),
        ((5 * MIB, 1), 9, 1),  # one record is never too much
        ((1, 5 * MIB, 1), 9, 1),
    ],
)
def test_a_piece_is_bounded_in_records_and_bytes(sizes: tuple[int, ...], count: int, taken: int) -> None:
    whole = batch(7, *sizes)
    first, rest = whole.split(count, 2 * MIB + 10_000)
    assert len(first) == taken
    assert [*first.records, *(rest.records if rest else ())] == whole.records
    assert rest is None or (rest.start, first.start) == (7 + taken, 7)


def test_keys_count_as_values_do() -> None:
    assert bytes_of(record(0, 10, b"x" * MIB)) - bytes_of(record(0, 10)) == MIB


async def _fetched(room: dict[str, int], sizes: dict[TP, list[int]], headers: Any = ()) -> dict[TP, int]:
    async def give(consumer: object, partitions: set[TP], timeout: float, max_records: int) -> dict[TP, list[Any]]:
        return {tp: [record(n, size, headers=headers) for n, size in enumerate(sizes[tp])] for tp in partitions}

    thread: Any = SimpleNamespace(
        _ensure_consumer=lambda: None, _positions=lambda consumer, partitions: {}, _fetch_records=give
    )
    found = await ClientThread.fetch(thread, dict.fromkeys(sizes, 5_000), 0.1, room)
    return {tp: len(records) for tp, records in found.records.items()}


async def test_a_fetch_ends_where_the_topics_room_does() -> None:
    """In the order asked for; another topic has a room of its own."""
    prices, trades = [TP("prices", n) for n in range(4)], TP("transactions", 0)
    sizes = {**{tp: [MIB] * 3 for tp in prices}, trades: [1]}
    assert await _fetched({"prices": 4 * MIB, "transactions": 1}, sizes) == {prices[0]: 3, prices[1]: 3, trades: 1}


async def test_headers_take_room_too() -> None:
    first, second = TP("prices", 0), TP("prices", 1)
    headers = (("note", b"x" * MIB), ("none", None))
    assert await _fetched({"prices": MIB}, {first: [1], second: [1]}, headers) == {first: 1}


def test_what_is_on_its_way_takes_room_until_it_is_acknowledged() -> None:
    one, other = TP("prices", 0), TP("prices", 1)
    consumer: Any = SimpleNamespace(
        app=SimpleNamespace(batch_topics={"prices": BatchLimits(5_000, size=10 * MIB), "transactions": BatchLimits(1)}),
        _sent={one: [(4, 3 * MIB), (9, MIB)], other: [(2, 2 * MIB)]},
    )
    room = BatchConsumer._room(consumer)
    assert room == {"prices": 4 * MIB, "transactions": BatchLimits(1).size}


async def test_jobs_that_have_arrived_count_before_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a chunk takes long nothing opens them; batches wait outside, and a rebalance drops those that do."""
    monkeypatch.setattr(herd, "_WINDOW_JOBS", 10)
    monkeypatch.setattr(herd, "_LOOK_SECONDS", 0)
    settings = SimpleNamespace(reset_chunk_rows=100, reset_chunk_target_ms=100, topic=str)
    app: Any = SimpleNamespace(settings=settings, should_stop=False, rebalancing=False)
    jobs = Herd(app)
    await jobs.take(batch(0, *[1] * 6))
    await jobs.take(batch(6, *[1] * 6))
    third = asyncio.create_task(jobs.take(batch(12, *[1] * 6)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not third.done()
    app.rebalancing = True
    await third
    assert len(jobs._arrivals) == 2
