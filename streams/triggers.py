"""Role `triggers`: the trigger agent with its table, and the web view (design, Trigger agent and table).

One agent reads triggers and statuses, so that a security's events are taken one after another. It is the job topic's
only writer: publish, wait for the broker's ack, then write the table, then acknowledge (`streams/write_behind.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any

import msgspec

from streams import health, logs, metrics, observer, topics
from streams.app import App
from streams.hourly import HourlyLimit
from streams.settings import load
from streams.web import console
from streams.write_behind import WriteBehind
from tables import triggers
from tables.triggers import Decision, Entry, Status, Trigger

logger = logging.getLogger(__name__)

app = App("triggers", load())
health.add_pages(app)
observer.join(app)

for each in (topics.TRIGGERS, topics.STATUS):
    metrics.DEAD_LETTERS.labels(each, "poison")  # begins at zero

_skips = HourlyLimit(app.settings.poison_verdicts_per_hour)
_TRIGGERS = app.settings.topic(topics.TRIGGERS)
_entry = msgspec.json.Decoder(Entry)
_trigger = msgspec.json.Decoder(Trigger)
_status = msgspec.json.Decoder(Status)

jobs = app.topic(app.settings.topic(topics.JOBS), key_type=bytes, value_type=bytes)
table = app.Table(
    topics.TABLE,
    key_type=bytes,
    value_type=bytes,
    partitions=app.settings.internal_partitions,
    options={"block_cache_size": 64 << 20, "write_buffer_size": 8 << 20, "max_open_files": 256},
)
console.add_pages(app, table, _entry.decode)


@app.agent(app.topic(_TRIGGERS, app.settings.topic(topics.STATUS), key_type=bytes, value_type=bytes))
async def decide(stream: Any) -> None:
    """Triggers and statuses → jobs and the table. An error stops the worker with the events unacknowledged."""
    run = WriteBehind(app, table, stream)
    event: Any = None
    try:
        async for event in run.events():
            about = _about(event)
            number = about.get("job_id") or about.get("seq")
            with logs.about(**about), app.traces.span("decide", number, **about, topic=event.message.topic):
                await _take(run, event)
    except Exception as error:
        logger.exception("from %s on", event and event.message)
        app.fail(f"{type(error).__name__}: {error}")


async def _take(run: WriteBehind, event: Any) -> None:
    decided = _survive(run.get(event.key), event)
    if decided is None:
        return
    entry, decision = decided
    if decision.publish or decision.release:
        run.published(await _publish(event.key, entry, decision))
    if decision.entry != entry:
        run.set(event, None if decision.entry is None else msgspec.json.encode(decision.entry))


def _survive(value: bytes | None, event: Any) -> tuple[Entry | None, Decision] | None:
    """The key's entry and what follows from the event; None for an event that fails again and again, which is skipped.

    Nothing here waits for anything, so what fails each time fails by itself. The ledger triggers again what was lost.
    Raises at the hour's limit of such events: then something else is wrong, and the worker stops.
    """
    settings = app.settings
    for attempt in range(1, settings.poison_attempts + 1):
        try:
            entry = None if value is None else _entry.decode(value)
            return entry, _decide(event, entry)
        except Exception as error:
            name, place = event.message.topic, f"{event.message.topic}[{event.message.partition}]"
            if attempt < settings.poison_attempts:
                continue
            if not _skips.allow(time.monotonic()):
                raise
            metrics.DEAD_LETTERS.labels(name.removeprefix(settings.topic_prefix), "poison").inc()
            logger.critical("%s: the event at offset %d is passed over as poison: %s: %s",
                            place, event.message.offset, type(error).__name__, error)  # fmt: skip
    return None


def _decide(event: Any, entry: Entry | None) -> Decision:
    now = datetime.now(UTC)
    if event.message.topic == _TRIGGERS:
        metrics.TRIGGER_EVENTS.labels("trigger").inc()
        return triggers.on_trigger(entry, _trigger.decode(event.value), now)
    metrics.TRIGGER_EVENTS.labels("status").inc()
    return triggers.on_status(entry, _status.decode(event.value), now)


async def _publish(key: bytes, before: Entry | None, decision: Decision) -> Awaitable[Any]:
    """Send a job, or the tombstone of the one that was in flight; returns the broker's answer."""
    value = msgspec.json.encode(decision.publish) if decision.publish else None
    job_id = decision.publish.job_id if decision.publish else before.in_flight.job_id  # type: ignore[union-attr]
    headers = {
        "event_id": str(job_id).encode(), "job_id": str(job_id).encode(), "security_id": key,
        **app.traces.headers(job_id),
    }  # fmt: skip
    with logs.about(job_id=job_id):
        logger.info("job %d %s", job_id, "published" if decision.publish else "released")
    answer: Awaitable[Any] = await jobs.send(key=key, value=value, headers=headers)
    return answer


def _about(event: Any) -> dict[str, Any]:
    """security_id, event_id, and seq of a trigger or job_id of a status, as far as the headers have them."""
    found: dict[str, Any] = {"security_id": event.key.decode(errors="replace")}
    for name in ("event_id", "seq", "job_id"):
        value = (event.headers or {}).get(name, b"")
        if value.isdigit():
            found[name] = int(value)
    return found
