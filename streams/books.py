"""Role `books`: the valuation loop, the outbox relay and the repair of corrections that lost their job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import TypeVar

from sinks import corrections
from sinks.database import is_transient
from sinks.valuation import Pass, Valuation
from streams import health, metrics, observer, topics
from streams.app import App
from streams.relay import Relay
from streams.settings import load

T = TypeVar("T")

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.1  # the poll is the truth; status events only shorten the wait
_REPAIR_SECONDS = 5.0

app = App("books", load())
health.add_pages(app)
observer.join(app)
_work = asyncio.Event()


@app.agent(app.topic(app.settings.topic(topics.STATUS), value_type=bytes))
async def hear_status(statuses: AsyncIterable[bytes]) -> None:
    """A finished job leaves dirty keys: value them now rather than at the next poll."""
    async for _ in statuses:
        _work.set()


async def value_dirty_keys() -> None:
    """The valuation loop: one short transaction after another until nothing is due."""
    valuation = Valuation(await app.pool(), app.settings.valuation_keys)
    while not app.should_stop:
        _work.clear()
        done = await _persist(valuation.pass_once)
        if done is not None and done != Pass():
            metrics.KEYS_VALUED.inc(done.keys)
            for seconds in done.right_after_seconds:
                metrics.RIGHT_SECONDS.observe(seconds)
            metrics.SNAPSHOTS_WRITTEN.inc(done.snapshots)
            app.outbox_written()
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_SECONDS):
                await _work.wait()


async def reissue_corrections() -> None:
    """Corrections that have settled get their trigger; those without a live job for too long get a repair trigger."""
    pool = await app.pool()
    settling = app.settings.debounce
    every = min(_REPAIR_SECONDS, settling.seconds / 4) if settling else _REPAIR_SECONDS

    async def reissue() -> int:
        async with pool.acquire() as connection, connection.transaction():
            return await corrections.reissue(connection, app.settings.repair_after_seconds)

    while not app.should_stop:
        if await _persist(reissue):
            app.outbox_written()
        await asyncio.sleep(every)


async def _persist(work: Callable[[], Awaitable[T]]) -> T | None:
    """The work's result; None when a transient error stopped it (the caller's loop comes again)."""
    try:
        return await work()
    except Exception as error:
        if not is_transient(error):
            raise
        logger.warning("%s: %s; trying again", type(error).__name__, error)
        await asyncio.sleep(0.5)
        return None


app.forever(value_dirty_keys)
app.forever(reissue_corrections)
app.forever(Relay(app.settings, lambda: app.should_stop).run)
