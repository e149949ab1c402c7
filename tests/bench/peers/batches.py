"""Tidemark's batch transport: one Faust event is a whole chunk of a partition. Offsets are claimed in Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterable

import faust
import uvloop

from sinks.batches import Batch
from streams import garbage
from streams.app import App
from streams.settings import load_named
from streams.topics import PRICES
from tests.bench.peers.fold import Clock, State, config, fold

uvloop.install()  # before the app, which makes the loop
wanted, state = config(), State()
clock = Clock(wanted["records"])
app = App("intake", load_named(**wanted["settings"]))


@app.agent(app.input(PRICES))
async def read(batches: AsyncIterable[Batch]) -> None:
    """Read and fold."""
    async for batch in batches:
        clock.begin()
        for record in batch.records:
            fold(state, record.value)
        clock.done(len(batch.records), state)


garbage.look_less_often()
faust.Worker(app, loglevel="WARN", redirect_stdouts=False, quiet=True).execute_from_commandline()
