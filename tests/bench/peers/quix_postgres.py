"""Quix Streams with its own Postgres sink (at least once)."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from quixstreams.sinks.community.postgresql import PostgreSQLSink

from streams.records import decode_price
from tests.bench.peers.fold import Clock, config
from tests.bench.peers.quix_prices import open_prices

wanted = config()
clock = Clock(wanted["records"])
database = urlsplit(wanted["database_url"])
app, prices = open_prices(wanted, commit_every=wanted["batch"])
sink = PostgreSQLSink(
    host=database.hostname or "",
    port=database.port or 0,
    dbname=database.path.lstrip("/"),
    user=database.username or "",
    password=unquote(database.password or ""),
    table_name=wanted["table"],
    schema_auto_update=False,
    primary_key_columns=["security_id", "price_date"],
    upsert_on_primary_key=True,
    include_metadata=False,
)


def row(value: bytes) -> dict[str, Any]:
    """The price as columns."""
    clock.begin()
    price = decode_price(value)
    return {
        "security_id": price.security_id,
        "price_date": price.price_date,
        "price": price.price,
        "currency": price.currency,
        "revision": price.revision,
    }


prices.apply(row).sink(sink)
app.run(count=wanted["records"], collect=False)  # flushes and commits before it returns
clock.report(None)
