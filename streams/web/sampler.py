"""What the overview shows, sampled in the background: a page costs a rendering, however many look at it.

What is dear to count is counted more rarely (`sinks/backlog.py`): looking costs Postgres less than one percent
of a core; everything else is fresh at each sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sinks import backlog, ledger, monitor, operations, roster
from sinks.database import Connection, is_transient
from streams.app import App
from streams.lag import LagReader, LagUnknown, PartitionLag
from streams.web.charts import Sparkline, sparkline

logger = logging.getLogger(__name__)

HOUR = 3600.0
_SHOWN = 12
_FAST, _SLOW = 2.0, 10.0  # seconds between samples: while somebody looks, and while nobody does
_LOOKING = 15.0  # so long after the last look somebody counts as looking
_LAG_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class TopicLag:
    """Of one group on one topic: records in all, seconds at worst."""

    consumergroup: str
    topic: str
    partitions: int
    records: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The installation at one moment. counted_at: when gauges were counted. lags None: the broker does not answer."""

    at: datetime
    counted_at: datetime
    gauges: monitor.Gauges
    limit: operations.LimitState | None
    corrections: list[ledger.Correction]
    workers: list[roster.Worker]
    lags: list[TopicLag] | None
    reset_rate: float
    valuation_rate: float

    @property
    def settled(self) -> bool:
        """Whether the books are right: nothing is dirty, nothing is open."""
        return self.gauges.dirty_keys == 0 and self.gauges.corrections_open == 0 and not self.corrections


@dataclass(frozen=True, slots=True)
class _Counted:
    at: float
    reset: int
    valued: int
    reset_rate: float
    valuation_rate: float


class Sampler:
    """`latest` and `charts` are read by pages; `changed` wakes whoever streams them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._looked = 0.0
        self._wake = asyncio.Event()
        self._series: dict[str, deque[tuple[float, float]]] = {}
        self._counted: dict[UUID, _Counted] = {}
        self._lags: tuple[float, list[TopicLag] | None] = (0.0, None)
        self._closing = AsyncExitStack()
        self._reader: LagReader | None = None
        self.latest: Sample | None = None
        self.changed = asyncio.Condition()

    def look(self) -> None:
        """Somebody looks: sample often."""
        if time.monotonic() - self._looked > _LOOKING:
            self._wake.set()
        self._looked = time.monotonic()

    async def run(self) -> None:
        """Until the worker stops."""
        try:
            while not self._app.should_stop:
                await self._try()
                pause = _FAST if time.monotonic() - self._looked < _LOOKING else _SLOW
                self._wake.clear()
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            async with self.changed:
                self.changed.notify_all()  # streams end with the worker
            await self._closing.aclose()

    def charts(self) -> list[Sparkline]:
        """The last hour."""
        return [sparkline(name, list(values), HOUR) for name, values in self._series.items()]

    async def _try(self) -> None:
        try:
            sample = await self._sample()
        except Exception as error:  # the worker has other things to do than to be looked at
            logger.log(logging.WARNING if is_transient(error) else logging.ERROR, "overview: %s", error, exc_info=error)
            return
        self.latest = sample
        self._remember(sample)
        async with self.changed:
            self.changed.notify_all()

    async def _sample(self) -> Sample:
        async with (await self._app.pool()).acquire() as connection:
            counted_at, gauges = await backlog.read(connection)
            limit = await operations.limit_state(connection)
            corrections = await ledger.corrections(connection, ledger.Filter("OPEN"), None, _SHOWN)
            workers = await roster.read(connection)
            lags = await self._read_lags(connection)
        reset, valued = self._rates(workers)
        return Sample(datetime.now(UTC), counted_at, gauges, limit, corrections, workers, lags, reset, valued)

    async def _read_lags(self, connection: Connection) -> list[TopicLag] | None:
        at, lags = self._lags
        if time.monotonic() - at < _LAG_SECONDS:
            return lags
        try:
            if self._reader is None:
                self._reader = await self._closing.enter_async_context(LagReader(self._app.settings))
            lags = summed(await self._reader.read(connection))
        except LagUnknown as error:
            logger.warning("lag: %s", error)
            lags = None
        self._lags = (time.monotonic(), lags)
        return lags

    def _rates(self, workers: Sequence[roster.Worker]) -> tuple[float, float]:
        """Keys reset and valued per second, all workers together, between the last two reports of each."""
        for worker in workers:
            seen, reset, valued = worker.seen_at.timestamp(), worker.keys_reset, worker.keys_valued
            last = self._counted.get(worker.worker_id)
            if last is None:
                self._counted[worker.worker_id] = _Counted(seen, reset, valued, 0.0, 0.0)
            elif seen > last.at:
                span = seen - last.at
                rates = (reset - last.reset) / span, (valued - last.valued) / span
                self._counted[worker.worker_id] = _Counted(seen, reset, valued, *rates)
        alive = [self._counted[worker.worker_id] for worker in workers if not worker.gone]
        return sum(each.reset_rate for each in alive), sum(each.valuation_rate for each in alive)

    def _remember(self, sample: Sample) -> None:
        now = time.monotonic()
        values = {
            "Dirty keys": sample.gauges.dirty_keys,
            "Open corrections": sample.gauges.corrections_open,
            "Keys reset per second": sample.reset_rate,
            "Keys valued per second": sample.valuation_rate,
            "Records behind": sum(lag.records for lag in sample.lags or []),
        }
        for name, value in values.items():
            series = self._series.setdefault(name, deque())
            series.append((now, float(value)))
            while series[0][0] < now - HOUR:
                series.popleft()


def summed(lags: Sequence[PartitionLag]) -> list[TopicLag]:
    """Per group and topic."""
    found: dict[tuple[str, str], list[PartitionLag]] = {}
    for lag in lags:
        found.setdefault((lag.consumergroup, lag.topic), []).append(lag)
    return [
        TopicLag(group, topic, len(rows), sum(row.lag for row in rows), max(row.lag_seconds for row in rows))
        for (group, topic), rows in found.items()
    ]
