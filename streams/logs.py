"""Logs for machines: one JSON object per line, with what the line is about (setting LOG_FORMAT=json).

What a task works on is said once, with `about`; every line logged meanwhile carries it, from whichever module.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from aiohttp.http import HttpProcessingError
from aiohttp.web import RequestPayloadError
from mode.utils.logging import DEFAULT_FORMATTERS, ExtensionFormatter

from streams.visible import lines, visible_json

_about: ContextVar[dict[str, Any] | None] = ContextVar("_about", default=None)


@contextmanager
def about(**what: Any) -> Iterator[None]:
    """event_id, seq (of a correction), job_id, security_id, …: in every line of this task until the end of the block.

    None is left out.
    """
    token = _about.set({**(_about.get() or {}), **{name: value for name, value in what.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


class JsonFormatter(logging.Formatter):
    """at (UTC), level, logger, message, what it is about, and the trace of an error as text."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **(_about.get() or {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return visible_json(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(ExtensionFormatter):  # type: ignore[misc]
    """Faust's lines, of which no text of others can make up one: what follows a line break is indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The first line and what belongs to it."""
        record.message = lines(record.message)
        return str(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The trace, all of it indented."""
        return "    " + lines(super().formatException(ei))


def is_no_bad_request(record: logging.LogRecord) -> bool:
    """A filter for aiohttp, which logs with a trace that a client sent what is no HTTP; the client is told already."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | RequestPayloadError))


def text_configuration() -> dict[str, Any]:
    """Faust's own configuration with lines that cannot be forged."""
    return {
        "merge": True,
        "formatters": {"colored": {**DEFAULT_FORMATTERS["colored"], "()": "streams.logs.TextFormatter"}},
    }


def configuration() -> dict[str, Any]:
    """For logging.config.dictConfig: JSON lines on standard error."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "streams.logs.JsonFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": "INFO"},
        "loggers": {"aiokafka": {"level": "WARNING"}},
    }
