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
from sinks import offsets, prices, resets
from streams import records, table_recovery, transport, trial, trials, write_behind
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

    async def step(self, batch, next_offset, effect, **more):
        async def nothing(connection) -> None:
            return None

        if next_offset > self._held[(batch.topic, batch.partition)].next_offset:
            await whole(self, batch, next_offset, nothing)
        return await whole(self, batch, next_offset, effect, **more)

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

    async def step(self, batch, next_offset, effect, **more):
        async with (await self._pool()).acquire() as connection:
            await connection.execute("select pg_advisory_lock_shared($1)", GATE)
            await connection.execute("select pg_advisory_unlock_shared($1)", GATE)
        return await whole(self, batch, next_offset, effect, **more)

    offsets.Offsets.step = step


def ack_first() -> None:
    """Triggers are acknowledged before what follows from them is kept."""
    whole = write_behind.WriteBehind.events

    async def events(self):
        async for event in whole(self):
            event.ack()
            yield event

    write_behind.WriteBehind.events = events


def tells_commits() -> None:
    """No protection removed: the worker says in its log when it has committed what is acknowledged to Kafka."""
    whole = transport.BatchConsumer.force_commit

    async def force_commit(self, *arguments, **named):
        did = await whole(self, *arguments, **named)
        print("has committed", flush=True)
        return did

    transport.BatchConsumer.force_commit = force_commit


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


def poisonous() -> None:
    """No protection removed: prices from 7.1 to 7.7 do something that no worker survives, each in its own way."""
    whole_decode, whole_effect = records.decode_price, prices.apply

    def decode_price(value):
        price = whole_decode(value)
        match str(price.price):
            case "7.1":
                raise AssertionError("a bug")
            case "7.2":
                os._exit(3)
            case "7.3":
                os.kill(os.getpid(), signal.SIGKILL)
            case "7.4":
                hoard = []
                while True:
                    hoard.append(bytearray(16 << 20))
            case "7.5":
                time.sleep(3600)
        return price

    async def apply(connection, found, *more):
        values = {str(price.price) for price in found}
        if "7.6" in values:
            connection.terminate()
        if "7.7" in values:
            await connection.execute("set local statement_timeout = '10ms'")
            await connection.execute("select pg_sleep(60)")
        return await whole_effect(connection, found, *more)

    records.decode_price, prices.apply = decode_price, apply


def poisonous_jobs() -> None:
    """No protection removed: a job of the security POISON ends the worker when it is opened."""
    whole = resets.open_jobs

    async def open_jobs(connection, jobs):
        if any(job.security_id == "POISON" for job in jobs):
            os._exit(3)
        return await whole(connection, jobs)

    resets.open_jobs = open_jobs


def broken_decoder() -> None:
    """No protection removed: every price ends the worker."""
    records.decode_price = lambda value: os._exit(3)


def broken_effect() -> None:
    """No protection removed: no price can be stored."""

    async def apply(connection, found, *more):
        raise KeyError("a column that this program does not know")

    prices.apply = apply


def busy_seek() -> None:
    """No protection removed: a seek ends once records wait in a queue, or once the fetcher is seen to stand still.

    Whether the records survive is what follows from the flow, and not from which task is the faster. The agent has at
    most one of them in hand meanwhile.
    """
    seek, rounds = transport.BatchConsumer.perform_seek, transport.BatchConsumer._wait_next_records
    resume, events = transport.BatchConsumer.resume_flow, write_behind.WriteBehind.events
    flowing, queues = asyncio.Event(), []
    flowing.set()

    def records_wait():
        return any(queue.qsize() > 1 for queue in queues)

    async def perform_seek(self):
        if transport._inside_fetcher.get():
            return await seek(self)
        flowing.clear()
        await seek(self)
        while self.app._fetcher.started and not (self.stands_still or records_wait()):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def wait_next_records(self, timeout):
        self.stands_still = not self.flow_active
        try:
            return await rounds(self, timeout)
        finally:
            self.stands_still = False

    def resume_flow(self):
        resume(self)
        flowing.set()

    async def held_events(self):
        queues.append(self._waiting)
        async for event in events(self):
            await flowing.wait()
            yield event

    transport.BatchConsumer.stands_still = False
    transport.BatchConsumer.perform_seek = perform_seek
    transport.BatchConsumer._wait_next_records = wait_next_records
    transport.BatchConsumer.resume_flow = resume_flow
    write_behind.WriteBehind.events = held_events


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
    began: list[float] = []

    def faust_settings(role, named, access):
        limits = {"broker_request_timeout": named.session_timeout_seconds, "broker_max_poll_interval": 2.0}
        return {**settings(role, named, access), **limits}

    def apply(self, tp, records):
        began.append(time.monotonic())
        if began[-1] < began[0] + 1.5 * self.app.settings.session_timeout_seconds:
            time.sleep(0.5)
        whole(self, tp, records)

    streams.app._faust_settings = faust_settings
    table_recovery._SAY_SECONDS = 1.0
    table_recovery._Recovery._apply = apply


def halted_restore() -> None:
    """No protection removed: the first restore gets some records, and no more as long as its group does not change."""
    whole, recoveries = table_recovery._Recovery._read_ahead, []
    table_recovery._FETCH_BYTES = 1
    table_recovery._SAY_SECONDS = 1.0

    class Halting(AIOKafkaConsumer):
        fetches = 0

        async def getmany(self, *partitions, timeout_ms):
            if len(recoveries) == 1 and self.fetches == 4:
                await asyncio.sleep(timeout_ms / 1000)
                return {}
            self.fetches += 1
            return await super().getmany(*partitions, timeout_ms=timeout_ms)

    async def read_ahead(self, *arguments):
        recoveries.append(self)
        await whole(self, *arguments)

    table_recovery.AIOKafkaConsumer = Halting
    table_recovery._Recovery._read_ahead = read_ahead


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
        no_fence, offset_first, no_stop_flow, deaf, gated, ack_first, tells_commits, one_by_one, open_runs,
        bug_in_decoder, poisonous, poisonous_jobs, broken_decoder, broken_effect,
        busy_seek, lose_fetches, no_chunks, dies_restoring, slow_restore, halted_restore, busy_copies,
        cancelled_below,
    )
}  # fmt: skip

if __name__ == "__main__":
    names = sys.argv.pop(1)
    trials.PROGRAM = [sys.executable, "-m", "tests.chaos.sabotage", names, "trial"]
    for name in names.split(","):
        SABOTAGES[name]()
    if sys.argv[1] == "trial":
        trial.main(*sys.argv[2:])
    main()
