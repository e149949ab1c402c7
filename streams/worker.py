"""Start one worker of a role in this process; `faust -A streams.ROLE worker` is the same."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import sys
from typing import NoReturn

import faust

from sinks import database
from streams import event_loop, preflight, tracing
from streams.settings import Settings

_ALLOCATIONS = 50_000
"""Containers made beyond those freed, until Python looks for cycles. Its own 700 are less than a millisecond of records:
a third of an intake worker's time went into looking, and hardly a cycle is made (docs/performance.md)."""


async def _check(settings: Settings, role: str) -> None:
    await database.check_schema(settings.dsn)
    await preflight.check(settings, role)


def run(role: str, settings: Settings) -> NoReturn:
    """Run until SIGTERM or SIGINT; exits the process. Raises SettingsError, DatabaseError and TopicError."""
    # Role modules read the settings themselves, at import: say what is missing before, in one line.
    settings.broker, settings.dsn  # noqa: B018
    settings.check_web()
    tracing.check()
    asyncio.run(_check(settings, role))
    event_loop.install()
    logging.getLogger("aiokafka").setLevel(logging.WARNING)
    app = importlib.import_module(f"streams.{role}").app
    _look_for_cycles_less_often()
    json = settings.log_format == "json"  # then nothing else may be written among the lines
    worker = faust.Worker(app, loglevel="INFO", redirect_stdouts=False, quiet=json)
    sys.exit(worker.execute_from_commandline())


def _look_for_cycles_less_often() -> None:
    """And never again through what has been imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)
