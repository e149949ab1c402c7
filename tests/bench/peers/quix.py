"""Quix Streams, its state in RocksDB with a changelog, as it comes. Needs the packages of requirements-bench.lock."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from quixstreams import Application, State

from sinks.model import Price
from streams.records import decode_price
from tests.bench.peers.fold import Clock, config

wanted = config()
clock = Clock(wanted["records"])
app = Application(
    broker_address=wanted["bootstrap"],
    consumer_group=wanted["group"],
    auto_offset_reset="earliest",
    state_dir=wanted["folder"],
    loglevel="WARNING",
)


def fold(price: Price, state: State) -> None:
    """One more price of its security; the record's key is the security."""
    clock.begin()
    count, total = state.get("total", [0, "0"])
    state.set("total", [count + 1, str(Decimal(total) + price.price)])
    clock.done(1, {})


topic: Any = app.topic(wanted["topic"], value_deserializer="bytes", key_deserializer="bytes")
frame = app.dataframe(topic).apply(decode_price).update(fold, stateful=True)
app.run()
