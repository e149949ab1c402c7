"""What a worker tells a tracer: nothing, unless an OpenTelemetry endpoint is configured (then `streams/otel.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sinks.corrections import Right
from streams.settings import Settings, SettingsError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Traces:
    """Spans of one worker, each about a correction or about a job, by its number; this one makes none."""

    @contextmanager
    def span(self, name: str, number: int | None, **about: Any) -> Iterator[None]:
        """What the block does for the correction or job; None: for none in particular."""
        yield

    def done(self, name: str, number: int, since: float, **about: Any) -> None:
        """What has been done for the correction or job since that time (seconds since 1970)."""

    def right(self, correction: Right) -> None:
        """A correction that is over."""

    def headers(self, number: int) -> dict[str, bytes]:
        """For a Kafka record about the correction or job: what carries its trace on."""
        return {}


def check() -> None:
    """Raises SettingsError where the environment asks for a tracer that cannot be had."""
    _tracer()


def start(role: str, settings: Settings) -> Traces:
    """The tracer that the environment asks for. Raises SettingsError where it cannot be had."""
    tracer = _tracer()
    return tracer(role, settings.topic_prefix) if tracer else Traces()


def _tracer() -> Callable[[str, str], Traces] | None:
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from streams.otel import OpenTelemetry
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise SettingsError(
            f"{endpoint} is set, but OpenTelemetry is not installed: `pip install 'tidemark[otel]'`, or unset it"
        ) from None
    return OpenTelemetry
