"""Workers with a protection taken out, or a moment held still: `python -m tests.chaos.sabotage NAME,… worker ROLE`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

import streams.app
from sinks import offsets
from streams import records, table_recovery, transport, write_behind
from tidemark.main import main

GATE = 0x6761_7465  # "gate"


def no_fence() -> None:
    """The offset moves whoever has claimed the partition since."""
    fence = "and next_offset = $5 and epoch = $6"
    assert fence in offsets._SWAP
    offsets._SWAP = offsets._SWAP.replace(fence, "and ($5::bigint, $6::bigint) is not null")


def offset_first() -> None:
    """The offset commits in a transaction of its own, before the effect."""
    whole = offsets.Offsets.step

    async def step(self, batch, next_offset, effect):
        async def nothing(connection) -> None:
            return None

        if next_offset > self._held[(batch.topic, batch.partition)].next_offset:
            await whole(self, batch, next_offset, nothing)
        return await whole(self, batch, next_offset, effect)

    offsets.Offsets.step = step


def no_stop_flow() -> None:
    """Records go on being delivered between the seek and the clearing of the queues."""
    whole = transport.BatchConsumer.perform_seek

    async def perform_seek(self):
        self.stop_flow = lambda: None
        try:
            await whole(self)
        finally:
            del self.stop_flow

    transport.BatchConsumer.perform_seek = perform_seek


def deaf() -> None:
    """No protection removed: a worker that does not hear of a rebalance in time has the fence alone."""
    offsets.Offsets.release = lambda self: None


def gated() -> None:
    """No protection removed: before a fenced transaction the worker waits for GATE, a lock that a test holds."""
    whole = offsets.Offsets.step

    async def step(self, batch, next_offset, effect):
        async with (await self._pool()).acquire() as connection:
            await connection.execute("select pg_advisory_lock_shared($1)", GATE)
            await connection.execute("select pg_advisory_unlock_shared($1)", GATE)
        return await whole(self, batch, next_offset, effect)

    offsets.Offsets.step = step


def ack_first() -> None:
    """Triggers are acknowledged before what follows from them is kept."""
    whole = write_behind.WriteBehind.events

    async def events(self):
        async for event in whole(self):
            event.ack()
            yield event

    write_behind.WriteBehind.events = events


def one_by_one() -> None:
    """No protection removed: triggers are taken one by one, as Faust does; for comparison."""
    write_behind._MOST = 1


def open_runs() -> None:
    """No protection removed: a run of triggers never ends of itself, as if what would end it were dropped."""

    async def more(self):
        return True

    write_behind.WriteBehind._more = more


def bug_in_decoder() -> None:
    """No protection removed: prices of 7 meet a bug."""
    whole = records.decode_price

    def decode_price(value):
        price = whole(value)
        assert price.price != 7, "a bug"
        return price

    records.decode_price = decode_price


def slow_seek() -> None:
    """No protection removed: after the seek it takes a moment until the flow goes on."""
    whole = transport.BatchConsumer.perform_seek

    async def perform_seek(self):
        await whole(self)
        if not transport._inside_fetcher.get():
            await asyncio.sleep(0.5)

    transport.BatchConsumer.perform_seek = perform_seek


def lose_fetches() -> None:
    """Not a protection removed: three fetches are lost on their way, as when they are cancelled on our side."""
    whole = transport.BatchConsumer._fetch_batches
    left = 3

    async def fetch(self, partitions, timeout):
        nonlocal left
        if left:
            lost = await self._thread.call_thread(
                self._thread.fetch, dict.fromkeys(partitions, 50), timeout, {tp.topic: 2**20 for tp in partitions}
            )
            left -= any(lost.records.values())
            return {}
        return await whole(self, partitions, timeout)

    transport.BatchConsumer._fetch_batches = fetch


def no_chunks() -> None:
    """No protection removed: the changelog cannot be read in chunks, so Faust replays all of it."""

    class Refused(AIOKafkaConsumer):
        async def getmany(self, *partitions, timeout_ms):
            raise KafkaError("no chunks")

    table_recovery.AIOKafkaConsumer = Refused


def dies_restoring() -> None:
    """No protection removed: towards the end of its first restore the worker is killed."""
    whole = table_recovery._Recovery._apply
    table_recovery._FETCH_BYTES = 1  # one of the producer's batches at a time

    def apply(self, tp, records):
        whole(self, tp, records)
        missing = self.active_remaining_total()
        if records[0].offset == 0:
            apply.since_the_beginning = True
        if apply.since_the_beginning and missing < sum(self.active_highwaters.values()) / 6:
            os.kill(os.getpid(), signal.SIGKILL)

    apply.since_the_beginning = False
    table_recovery._Recovery._apply = apply


def slow_restore() -> None:
    """No protection removed: a restore takes longer than Faust gives it, and than a member may leave off polling."""
    settings, whole = streams.app._faust_settings, table_recovery._Recovery._apply
    table_recovery._FETCH_BYTES = 1
    ends = time.monotonic() + 20  # of which the start takes some

    def faust_settings(role, named, access):
        limits = {"broker_request_timeout": named.session_timeout_seconds, "broker_max_poll_interval": 2.0}
        return {**settings(role, named, access), **limits}

    def apply(self, tp, records):
        if time.monotonic() < ends:
            time.sleep(0.5)
        whole(self, tp, records)

    streams.app._faust_settings = faust_settings
    table_recovery._SAY_SECONDS = 1.0
    table_recovery._Recovery._apply = apply


def busy_copies() -> None:
    """No protection removed: a worker that runs is amid the records of a copy when its recovery moves the positions."""
    whole = table_recovery._Recovery.on_recovery_completed

    async def on_recovery_completed(self, generation_id=0):
        lacking = {tp for tp in self.standby_tps if self.standby_highwaters[tp] > self.standby_offsets[tp]}
        begun = {tp: self.standby_offsets[tp] for tp in lacking}
        while self.app._fetcher.started and lacking and all(self.standby_offsets[tp] == begun[tp] for tp in lacking):  # noqa: ASYNC110
            await asyncio.sleep(0)
        await whole(self, generation_id)

    table_recovery._Recovery.on_recovery_completed = on_recovery_completed


def cancelled_below() -> None:
    """No protection removed: while the changelog is read, a cancellation comes from a library."""

    async def read_ahead(self, behind, offsets, missing):
        raise asyncio.CancelledError

    table_recovery._Recovery._read_ahead = read_ahead


SABOTAGES: dict[str, Callable[[], None]] = {
    change.__name__: change
    for change in (
        no_fence, offset_first, no_stop_flow, deaf, gated, ack_first, one_by_one, open_runs, bug_in_decoder, slow_seek,
        lose_fetches, no_chunks, dies_restoring, slow_restore, busy_copies, cancelled_below,
    )
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv.pop(1).split(","):
        SABOTAGES[name]()
    main()
