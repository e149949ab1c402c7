"""Role `resets`: the rate-limited watermark sink, in an app of its own (design, Watermark sink)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable

from sinks import limiter
from sinks.batches import Batch
from sinks.database import is_transient
from streams import generations, health, metrics, observer, topics
from streams.app import App
from streams.herd import Herd
from streams.job_trial import JobSubject
from streams.settings import load

logger = logging.getLogger(__name__)

_ADAPT_SECONDS = 1.0

app = App("resets", load())
health.add_pages(app)
observer.join(app)
generations.watch(app)
herd = Herd(app, lambda: app.pulse.beat("resets"))
app.trials.subjects[app.settings.topic(topics.JOBS)] = JobSubject(app)
metrics.DEAD_LETTERS.labels(topics.JOBS, "poison")
metrics.IN_TRIAL.labels(topics.JOBS)
metrics.FENCED.labels(app.settings.topic(topics.JOBS))  # begins at zero


@app.agent(app.input(topics.JOBS))
async def read_jobs(batches: AsyncIterable[Batch]) -> None:
    """reprocessing-jobs → the window."""
    async for batch in batches:
        await herd.take(batch)


async def adapt_rate() -> None:
    """The optional adaptive mode: give way to live transactions, come back slowly."""
    target = app.settings.reset_latency_target_ms / 1000
    stopping = app.stopping("adaptive rate")
    while not stopping():
        try:
            async with (await app.pool()).acquire() as connection:
                rate = await limiter.adapt(connection, target, _ADAPT_SECONDS)
            if rate is not None:
                metrics.RESET_RATE.set(rate)
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("adaptive rate: %s: %s", type(error).__name__, error)
        await asyncio.sleep(_ADAPT_SECONDS)


app.forever(herd.run)
if app.settings.reset_adaptive:
    app.forever(adapt_rate)
