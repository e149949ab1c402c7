"""In which order a sink commits what it is given: a partition's batches in turn, two partitions side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sinks.batches import Batch
from sinks.offsets import Fenced, Overburdened
from streams import sink_agent
from streams.pulse import Pulse
from streams.sink_agent import Sink


@dataclass
class Transactions:
    """Stands in for the offsets of a worker: each transaction lasts until it is let go."""

    begun: list[tuple[int, int]] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)
    gates: dict[tuple[int, int], asyncio.Event] = field(default_factory=dict)
    pieces: list[tuple[int, list[int]]] = field(default_factory=list)
    seconds_each: float = 0
    fenced_at: int | None = None
    at_most: int | None = None

    async def apply(self, batch: Batch, effect: Any, refuse: Any) -> Sequence[Any]:
        place = (batch.partition, batch.start)
        self.begun.append(place)
        if self.fenced_at == batch.start:
            raise Fenced
        if self.at_most is not None and len(batch) > self.at_most:
            raise Overburdened("statement timeout")
        self.pieces.append((batch.start, [record.offset for record in batch.records]))
        time.sleep(self.seconds_each * len(batch))  # noqa: ASYNC251 - the clock that is looked at is the real one
        await self.gate(*place).wait()
        self.ended.append(place)
        return []

    def gate(self, partition: int, start: int) -> asyncio.Event:
        return self.gates.setdefault((partition, start), asyncio.Event())


def batch(partition: int, start: int, *more: int) -> Batch:
    records = [
        SimpleNamespace(topic="t", partition=partition, offset=offset, key=None, value=b"x")
        for offset in (start, *more)
    ]
    return Batch("t", partition, 1, start, records)


@pytest.fixture
def transactions() -> Transactions:
    return Transactions()


@pytest.fixture
def sink(transactions: Transactions) -> Sink[bytes | None]:
    async def nothing(connection: object, records: object) -> Any:
        raise AssertionError("the effect belongs to the transaction")

    settings = SimpleNamespace(batch_records=40, batch_target_ms=100.0)
    pulse = Pulse(60, lambda: float("inf"))
    app: Any = SimpleNamespace(offsets=transactions, settings=settings, fenced=lambda batch: None, pulse=pulse)
    return Sink(app, "t", lambda value: value, nothing)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def given(*batches: Batch) -> AsyncIterator[Batch]:
    for each in batches:
        yield each


async def test_two_partitions_side_by_side_and_each_in_turn(
    sink: Sink[bytes | None], transactions: Transactions
) -> None:
    consuming = asyncio.create_task(sink.consume(given(batch(0, 0), batch(1, 0), batch(1, 5), batch(0, 7))))
    await settle()
    assert transactions.begun == [(0, 0), (1, 0)]
    transactions.gate(0, 0).set()
    await settle()
    assert transactions.begun == [(0, 0), (1, 0)], "(1, 5) must wait for (1, 0)"
    transactions.gate(1, 0).set()
    await settle()
    assert transactions.begun == [(0, 0), (1, 0), (1, 5), (0, 7)]
    transactions.gate(0, 7).set()
    await settle()
    assert not consuming.done(), "a transaction still runs"
    transactions.gate(1, 5).set()
    await consuming
    assert transactions.ended == [(0, 0), (1, 0), (0, 7), (1, 5)]


async def test_no_more_transactions_than_at_once(sink: Sink[bytes | None], transactions: Transactions) -> None:
    consuming = asyncio.create_task(sink.consume(given(*(batch(partition, 0) for partition in range(5)))))
    await settle()
    assert len(transactions.begun) == sink_agent._AT_ONCE
    transactions.gate(1, 0).set()
    await settle()
    assert transactions.begun == [(0, 0), (1, 0), (2, 0)]
    for partition in range(5):
        transactions.gate(partition, 0).set()
    await consuming
    assert [partition for partition, _ in transactions.begun] == [0, 1, 2, 3, 4]


async def test_what_runs_is_waited_for_when_the_stream_ends_with_an_error(
    sink: Sink[bytes | None], transactions: Transactions
) -> None:
    async def broken() -> AsyncIterator[Batch]:
        yield batch(0, 0)
        await settle()
        raise RuntimeError("the stream ends")

    consuming = asyncio.create_task(sink.consume(broken()))
    for _ in range(3):
        await settle()
    assert not consuming.done()
    transactions.gate(0, 0).set()
    with pytest.raises(RuntimeError, match="the stream ends"):
        await consuming
    assert transactions.ended == [(0, 0)]


async def test_transactions_have_as_many_records_as_their_time_allows(
    sink: Sink[bytes | None], transactions: Transactions
) -> None:
    transactions.seconds_each = 0.02
    offsets = [7 * number for number in range(200)]  # with holes, as compaction leaves them
    batches = [batch(0, *offsets[first : first + 50]) for first in range(0, 200, 50)]
    consuming = asyncio.create_task(sink.consume(given(*batches)))
    while not consuming.done():
        for _, event in list(transactions.gates.items()):
            event.set()
        await asyncio.sleep(0)
    await consuming
    sizes = [len(found) for _, found in transactions.pieces]
    assert sizes[0] == 40, "the largest, until it is seen to take too long"
    assert all(size <= 7 for size in sizes[4:]), sizes  # five fit; growing tries a few more now and then
    assert [offset for _, found in transactions.pieces for offset in found] == offsets
    follow = [
        (found[-1] + 1, start)
        for (_, found), (start, _) in zip(transactions.pieces, transactions.pieces[1:], strict=False)
    ]
    assert all(start in (end, *(each.start for each in batches)) for end, start in follow)


async def test_what_is_left_of_a_batch_is_dropped_when_it_is_fenced(
    sink: Sink[bytes | None], transactions: Transactions
) -> None:
    transactions.fenced_at = 40
    transactions.gate(0, 0).set()
    await sink.consume(given(batch(0, *range(100))))
    assert transactions.begun == [(0, 0), (0, 40)]


async def test_a_batch_that_is_too_much_is_halved_until_it_passes(
    sink: Sink[bytes | None], transactions: Transactions
) -> None:
    transactions.at_most = 3
    offsets = list(range(30))
    consuming = asyncio.create_task(sink.consume(given(batch(0, *offsets))))
    while not consuming.done():
        for _, event in list(transactions.gates.items()):
            event.set()
        await asyncio.sleep(0)
    await consuming
    assert [offset for _, found in transactions.pieces for offset in found] == offsets
    assert max(len(found) for _, found in transactions.pieces) <= 3
    assert len(transactions.begun) < 2 * len(transactions.pieces), "the size is learned, not found anew each time"
