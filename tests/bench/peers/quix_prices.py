"""What both peers on Quix Streams begin with. They need the packages of tests/bench/requirements.lock."""

from __future__ import annotations

from typing import Any

from quixstreams import Application
from quixstreams.dataframe import StreamingDataFrame


def open_prices(wanted: dict[str, Any], **options: Any) -> tuple[Application, StreamingDataFrame]:
    """The application, and the topic's records as bytes."""
    app = Application(
        broker_address=wanted["bootstrap"],
        consumer_group=wanted["group"],
        auto_offset_reset="earliest",
        state_dir=wanted["folder"],
        loglevel="WARNING",
        **options,
    )
    return app, app.dataframe(app.topic(wanted["topic"], value_deserializer="bytes", key_deserializer="bytes"))
