"""Quix Streams, its state in RocksDB with a changelog, as it comes."""

from __future__ import annotations

from decimal import Decimal

from quixstreams import State

from sinks.model import Price
from streams.records import decode_price
from tests.bench.peers.fold import Clock, config
from tests.bench.peers.quix_prices import open_prices

wanted = config()
clock = Clock(wanted["records"])
app, prices = open_prices(wanted)


def fold(price: Price, state: State) -> None:
    """One more price of its security; the record's key is the security."""
    clock.begin()
    count, total = state.get("total", [0, "0"])
    state.set("total", [count + 1, str(Decimal(total) + price.price)])
    clock.done(1, {})


prices.apply(decode_price).update(fold, stateful=True)
app.run()
