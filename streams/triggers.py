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

from sinks import corrections
from streams import generations, health, internal, logs, metrics, observer, topics
from streams.app import App
from streams.hourly import HourlyLimit
from streams.internal import Drawn, Skipped
from streams.settings import load
from streams.web import console
from streams.write_behind import WriteBehind
from tables import triggers
from tables.triggers import Decision, Entry, Status, Trigger

logger = logging.getLogger(__name__)

app = App("triggers", load())
health.add_pages(app)
observer.join(app)
generations.watch(app)

for each in (topics.TRIGGERS, topics.STATUS):
    metrics.DEAD_LETTERS.labels(each, "poison")  # begins at zero

_skips = HourlyLimit(app.settings.poison_verdicts_per_hour)
_TRIGGERS = app.settings.topic(topics.TRIGGERS)
_STATUS = app.settings.topic(topics.STATUS)
_HIGHEST = 2**63 - 1
_skipped = {name: Skipped(name) for name in (_TRIGGERS, _STATUS)}
_rows = Skipped(topics.changelog(app.settings))

jobs = app.topic(app.settings.topic(topics.JOBS), key_type=bytes, value_type=bytes)
table = app.Table(
    topics.TABLE,
    key_type=bytes,
    value_type=bytes,
    partitions=app.settings.internal_partitions,
    options={"block_cache_size": 64 << 20, "write_buffer_size": 8 << 20, "max_open_files": 256},
)
table.readable = _rows.holds
console.add_pages(app, table, lambda value: _rows.entry(value) or Entry())


async def _last_seq() -> int:
    async with (await app.pool()).acquire() as connection:
        return await corrections.last_seq(connection)


_drawn = Drawn(_last_seq)


@app.agent(app.topic(_TRIGGERS, _STATUS, key_type=bytes, value_type=bytes))
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
    found = await _read(event)
    if found is None:
        return
    entry = _rows.entry(run.get(event.key))
    if entry and not await _drawn.holds(entry.highest):
        _rows.count("number", f"{entry.highest} has not been drawn")
        entry = Entry()
    decision = _decide(event, entry, found)
    if decision is None:
        return
    if decision.publish or decision.release:
        run.published(await _publish(event.key, entry, decision))
    if decision.entry != entry:
        run.set(event, None if decision.entry is None else msgspec.json.encode(decision.entry))


def _decide(event: Any, entry: Entry | None, found: Trigger | Status) -> Decision | None:
    """What follows from the event; None for one that fails, which is skipped.

    Nothing here waits for anything, so what fails once fails each time. The ledger triggers again what was lost.
    Raises at the hour's limit of such events: then something else is wrong, and the worker stops.
    """
    now = datetime.now(UTC)
    try:
        if isinstance(found, Trigger):
            return triggers.on_trigger(entry, found, now)
        return triggers.on_status(entry, found, now)
    except Exception as error:
        if not _skips.allow(time.monotonic()):
            raise
        topic, place = event.message.topic, f"{event.message.topic}[{event.message.partition}]"
        metrics.DEAD_LETTERS.labels(topic.removeprefix(app.settings.topic_prefix), "poison").inc()
        logger.critical("%s: the event at offset %d is passed over as poison: %s: %s",
                        place, event.message.offset, type(error).__name__, error)  # fmt: skip
        return None


async def _read(event: Any) -> Trigger | Status | None:
    """What the event says; None where it says nothing that could be true."""
    found: Trigger | Status | None
    skipped = _skipped[event.message.topic]
    if event.message.topic == _TRIGGERS:
        metrics.TRIGGER_EVENTS.labels("trigger").inc()
        found = skipped.read(internal.decode_trigger, event)
        number = found.seq if found else 0
    else:
        metrics.TRIGGER_EVENTS.labels("status").inc()
        found = skipped.read(internal.decode_status, event)
        number = found.job_id if found else 0
    if found and not await _drawn.holds(number):
        skipped.count("number", f"{number} has not been drawn")
        return None
    return found


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
    """security_id, event_id, and seq of a trigger or job_id of a status, as far as key and headers have them."""
    found: dict[str, Any] = {"security_id": (event.key or b"").decode(errors="replace")}
    for name in ("event_id", "seq", "job_id"):
        value = (event.headers or {}).get(name) or b""
        if value.isdigit() and len(value) < 20 and int(value) <= _HIGHEST:
            found[name] = int(value)
    return found
