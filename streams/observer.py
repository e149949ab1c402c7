"""What every worker says of itself, and what one of them, the observer, says of the whole installation.

The observer is whichever worker of whichever role holds an advisory lock: when it dies another takes over, so lag is
reported while no worker of a group is alive, and each series comes from one worker only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from uuid import UUID, uuid4

from sinks import audit_progress, backlog, operations, outbox, roster
from sinks.database import Connection, is_transient, leadership
from streams import metrics
from streams.app import App
from streams.lag import LagReader, LagUnknown

logger = logging.getLogger(__name__)

_OBSERVER_LOCK = 0x6F62_7376  # "obsv"
_FOLLOWER_SECONDS = 3.0
_REPORT_SECONDS = 3.0
_LEAVE_SECONDS = 2.0
_LAG_SECONDS = 5.0
_GAUGE_SECONDS = 5.0

_NAMES = {
    "triggers_pending": "instrument_reprocessing_triggers_pending",
    "corrections_open": "corrections_open",
    "corrections_held": "corrections_held",
    "oldest_correction_seconds": "correction_oldest_open_seconds",
    "active_keys": "reprocessing_active_keys_total",
    "dirty_keys": "dirty_keys",
    "dirty_snapshots": "dirty_snapshots",
    "gap_days": "scheduler_gap_days",
    "transactions_out_of_range": "transactions_out_of_range",
}


def join(app: App) -> None:
    """Let the worker report itself, and observe when it is its turn."""
    worker_id = uuid4()
    metrics.STANDBY_REMAINING.set_function(lambda: app.standby_remaining)
    app.from_start(lambda: _be_listed(app, worker_id))
    app.from_start(lambda: _until_stopped(app, "observer", lambda: _observe(app), _FOLLOWER_SECONDS))


async def _until_stopped(app: App, name: str, body: Callable[[], Awaitable[None]], pause: float) -> None:
    """Again and again; what fails for a while is tried again, and nothing here may stop the worker."""
    stopping = app.stopping(name)
    while not stopping():
        try:
            await body()
        except Exception as error:
            if not is_transient(error):
                logger.exception("observer")
        await asyncio.sleep(pause)


# -- itself --------------------------------------------------------------------------------------------------------


async def _be_listed(app: App, worker_id: UUID) -> None:
    try:
        await _until_stopped(app, "roster", lambda: _report(app, worker_id), _REPORT_SECONDS)
    finally:
        with contextlib.suppress(Exception):  # a row that stays is seen to be silent
            async with asyncio.timeout(_LEAVE_SECONDS), (await app.pool()).acquire() as connection:
                await roster.leave(connection, worker_id)


async def _report(app: App, worker_id: UUID) -> None:
    missing = await app.ready()
    remaining = app.restore_remaining
    metrics.READY.labels(app.role).set(missing is None)
    metrics.RESTORE_REMAINING.set(remaining)
    pool = await app.pool()
    metrics.POOL_CONNECTIONS.labels("idle").set(pool.get_idle_size())
    metrics.POOL_CONNECTIONS.labels("busy").set(pool.get_size() - pool.get_idle_size())
    found = roster.Report(
        worker_id,
        app.role,
        socket.gethostname(),
        os.getpid(),
        str(app.conf.canonical_url),
        missing,
        app.partitions,
        remaining,
        _counted("reprocessing_keys_reset_total"),
        _counted("valuation_keys_total"),
    )
    async with pool.acquire() as connection:
        await roster.report(connection, found)


def _counted(name: str) -> int:
    return int(metrics.REGISTRY.get_sample_value(name) or 0)


# -- the installation ----------------------------------------------------------------------------------------------


async def _observe(app: App) -> None:
    async with leadership(app.settings.dsn, _OBSERVER_LOCK) as connection:
        if connection is None:
            return
        logger.info("this worker observes")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_watch_lag(app, connection))
                tasks.create_task(_watch_backlog(app))
        except* Exception as errors:
            raise errors.exceptions[0] from None
        finally:
            metrics.CLUSTER.gauges = metrics.CLUSTER.lags = None
            app.pulse.end("observer: gauges")


async def _watch_lag(app: App, connection: Connection) -> None:
    """Ends with an error when the connection that holds the lock is lost."""
    stopping = app.stopping("observer")
    while not stopping():
        try:
            async with LagReader(app.settings) as reader:
                while not stopping():
                    metrics.CLUSTER.lags = [
                        (found.consumergroup, found.topic, found.partition, found.lag, found.lag_seconds)
                        for found in await reader.read(connection)
                    ]
                    await asyncio.sleep(_LAG_SECONDS)
        except LagUnknown as error:
            metrics.CLUSTER.lags = None
            metrics.LAG_ERRORS.inc()
            logger.warning("lag: %s; trying again", error)
        await asyncio.sleep(_FOLLOWER_SECONDS)
        await connection.fetchval("select 1")


async def _watch_backlog(app: App) -> None:
    pool = await app.pool()
    stopping = app.stopping("observer: gauges")
    while not stopping():
        async with pool.acquire() as connection:
            gauges = asdict((await backlog.read(connection))[1])
            waiting = await outbox.backlog(connection)
            limit = await operations.limit_state(connection)
            audit_age = await audit_progress.full_pass_age(connection)
        metrics.CLUSTER.gauges = {
            **{name: gauges[field] for field, name in _NAMES.items()},
            "reprocessing_reset_limit": limit.in_force if limit else app.settings.reset_rows_per_second,
            "outbox_events_pending": waiting.pending,
            "outbox_events_held": waiting.held,
            "outbox_oldest_age_seconds": waiting.oldest_seconds,
            "audit_last_full_pass_age_seconds": math.nan if audit_age is None else audit_age,
        }
        await asyncio.sleep(_GAUGE_SECONDS)
