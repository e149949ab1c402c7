"""Role `books`: valuation, the relay, repairs of lost corrections and outdated histories, retention, the auditor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

from sinks import corrections, outdated, retention
from sinks.corrections import Right
from sinks.database import is_transient
from sinks.valuation import Pass, Valuation
from streams import generations, health, logs, metrics, observer, topics
from streams.app import App
from streams.auditor import audit_continuously
from streams.relay import Relay
from streams.settings import load

T = TypeVar("T")

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.1  # the poll is the truth; status events only shorten the wait
_REPAIR_SECONDS = 5.0
_OUTDATED_SECONDS = 60.0
_RETENTION_SECONDS = 60.0
_RETENTION_PAUSE_SECONDS = 0.05  # between two steps

app = App("books", load())
health.add_pages(app)
observer.join(app)
generations.watch(app)
_work = asyncio.Event()


@app.agent(app.topic(app.settings.topic(topics.STATUS), value_type=bytes))
async def hear_status(statuses: AsyncIterable[bytes]) -> None:
    """A finished job leaves dirty keys: value them now rather than at the next poll."""
    async for _ in statuses:
        _work.set()


async def value_dirty_keys() -> None:
    """The valuation loop: one short transaction after another until nothing is due."""
    valuation = Valuation(await app.pool(), app.settings.valuation_keys)
    stopping = app.stopping("valuation")
    while not stopping():
        _work.clear()
        done = await _persist(valuation.pass_once)
        if done is not None and done != Pass():
            metrics.KEYS_VALUED.inc(done.keys)
            for correction in done.right:
                _tell(correction)
            metrics.SNAPSHOTS_WRITTEN.inc(done.snapshots)
            app.outbox_written()
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_SECONDS):
                await _work.wait()


def _tell(correction: Right) -> None:
    metrics.RIGHT_SECONDS.observe(correction.seconds)
    with logs.about(seq=correction.seq, job_id=correction.job_id, security_id=correction.security_id):
        logger.info("correction %d: the books are right after %.3f s", correction.seq, correction.seconds)
    app.traces.right(correction)


async def reissue_corrections() -> None:
    """Corrections that have settled get their trigger; those without a live job for too long get a repair trigger."""
    pool = await app.pool()
    settling = app.settings.debounce
    every = min(_REPAIR_SECONDS, settling.seconds / 4) if settling else _REPAIR_SECONDS

    async def reissue() -> dict[str, int]:
        async with pool.acquire() as connection, connection.transaction():
            return await corrections.reissue(connection, app.settings.repair_after_seconds)

    stopping = app.stopping("repair")
    while not stopping():
        if triggered := await _persist(reissue):
            app.outbox_written()
            for security_id, seq in triggered.items():
                with logs.about(seq=seq, security_id=security_id):
                    logger.info("correction %d: triggered by the ledger", seq)
        await asyncio.sleep(every)


async def rebuild_outdated() -> None:
    """Histories that an earlier version wrote by other rules are booked anew: after an upgrade, and while it lasts."""
    rebuilder = outdated.Rebuilder(await app.pool(), app.settings.cost_basis_method)
    while not app.should_stop:
        done = await _persist(rebuilder.step)
        if done is None:
            continue
        if done.keys:
            app.outbox_written()
            logger.info("booked %d histories anew that an earlier version had written by other rules", done.keys)
        for (security_id, portfolio_id), error in done.failed.items():
            with logs.about(security_id=security_id):
                logger.error("the outdated history of %s in %s cannot be booked: %s", security_id, portfolio_id, error)
        await asyncio.sleep(0 if done.keys else _OUTDATED_SECONDS)


async def retain() -> None:
    """Remove what is older than the settings say, in small steps."""
    pool = await app.pool()
    steps = [
        (purge, timedelta(days=days))
        for purge, days in (
            (retention.purge_history, app.settings.retain_superseded_history_days),
            (retention.purge_jobs, app.settings.retain_finished_jobs_days),
        )
        if days
    ]

    async def step() -> int:
        async with pool.acquire() as connection:
            return sum([await purge(connection, age) for purge, age in steps])

    stopping = app.stopping("retention")
    while not stopping():
        removed = await _persist(step)
        metrics.ROWS_RETIRED.inc(removed or 0)
        await asyncio.sleep(_RETENTION_PAUSE_SECONDS if removed else _RETENTION_SECONDS)


async def audit() -> None:
    """The books against a recomputation, little by little."""
    await audit_continuously(app.settings, lambda: app.should_stop)


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
app.forever(rebuild_outdated)
app.forever(retain)
app.forever(audit)
app.forever(Relay(app.settings, app.stopping("relay"), traces=app.traces).run)
