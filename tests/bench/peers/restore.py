"""A `triggers` worker with an empty data directory, until its table has recovered; "stock": with Faust's own recovery.

It prints one line as the other peers do, timed from the assignment of the partitions.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import faust
import uvloop
from faust.tables.manager import TableManager

from streams.app import App
from streams.settings import load_named
from streams.topics import TABLE, TRIGGERS
from tests.bench.peers.fold import config

uvloop.install()  # before the app, which makes the loop
wanted = config()
settings = load_named(**wanted["settings"])
app: Any = App("triggers", settings)
if wanted["stock"]:
    app.conf.TableManager = TableManager
table = app.Table(TABLE, key_type=bytes, value_type=bytes, partitions=settings.internal_partitions)
started = 0.0


@app.on_partitions_assigned.connect
async def begin(*_: Any, **__: Any) -> None:
    """The recovery begins."""
    global started
    started = started or time.perf_counter()


@app.agent(app.topic(settings.topic(TRIGGERS), key_type=bytes, value_type=bytes))
async def decide(stream: Any) -> None:
    """There are no triggers."""
    async for _ in stream:
        pass


@app.task
async def end() -> None:
    """Faust starts tasks when the tables have recovered."""
    seconds = time.perf_counter() - started
    assert sum(1 for _ in table.keys()) == wanted["records"]  # noqa: SIM118 - a Faust table
    print("\n" + json.dumps({"records": wanted["records"], "seconds": seconds}), flush=True)
    os._exit(0)


faust.Worker(app, loglevel="WARN", redirect_stdouts=False, quiet=True).execute_from_commandline()
