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
        return json.dumps(line, ensure_ascii=False, default=str)


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
