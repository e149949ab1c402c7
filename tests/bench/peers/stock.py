"""A stock Faust agent, an event per record; "table": the state in a table with a changelog, else in a dict."""

from __future__ import annotations

from collections.abc import AsyncIterable
from decimal import Decimal
from typing import Any

import faust
import uvloop

from streams.records import decode_price
from tests.bench.peers.fold import Clock, State, config, fold

uvloop.install()  # before the app, which makes the loop
wanted, state = config(), State()
clock = Clock(wanted["records"])
app = faust.App(
    wanted["group"],
    broker=f"kafka://{wanted['bootstrap']}",
    store="memory://",
    datadir=wanted["folder"],
    value_serializer="raw",
    topic_partitions=wanted["partitions"],
    topic_disable_leader=True,
    consumer_auto_offset_reset="earliest",
    web_enabled=False,
)
table: Any = app.Table("totals", default=lambda: [0, "0"], partitions=wanted["partitions"]) if wanted["table"] else None


@app.agent(app.topic(wanted["topic"], value_type=bytes))
async def read(values: AsyncIterable[bytes]) -> None:
    """Read and fold."""
    async for value in values:
        clock.begin()
        if table is None:
            fold(state, value)
        else:
            price = decode_price(value)
            count, total = table[price.security_id]
            table[price.security_id] = [count + 1, str(Decimal(total) + price.price)]
        clock.done(1, state)


faust.Worker(app, loglevel="WARN", redirect_stdouts=False, quiet=True).execute_from_commandline()
