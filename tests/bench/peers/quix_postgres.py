"""Quix Streams with its own Postgres sink (at least once). Needs the packages of requirements-bench.lock."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from quixstreams import Application
from quixstreams.sinks.community.postgresql import PostgreSQLSink

from streams.records import decode_price
from tests.bench.peers.fold import Clock, config

wanted = config()
clock = Clock(wanted["records"])
database = urlsplit(wanted["database_url"])
app = Application(
    broker_address=wanted["bootstrap"],
    consumer_group=wanted["group"],
    auto_offset_reset="earliest",
    state_dir=wanted["folder"],
    commit_every=wanted["batch"],
    loglevel="WARNING",
)
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


topic: Any = app.topic(wanted["topic"], value_deserializer="bytes", key_deserializer="bytes")
app.dataframe(topic).apply(row).sink(sink)
app.run(count=wanted["records"], collect=False)  # flushes and commits before it returns
clock.report(None)
