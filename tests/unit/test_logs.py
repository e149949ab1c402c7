"""JSON logs: one object per line, with what the line is about."""

from __future__ import annotations

import io
import json
import logging
import logging.config

from streams import logs


def lines_of(write: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in write.getvalue().splitlines()]


def test_every_line_says_what_it_is_about() -> None:
    stream = io.StringIO()
    logger = logging.Logger("a.module")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logger.addHandler(handler)
    with logs.about(event_id="7", security_id="ünï\n"):
        logger.info("%d keys", 3)
        with logs.about(job_id=9, event_id=None):
            logger.warning("inner")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("outside")
    first, inner, outside = lines_of(stream)
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "a.module", "3 keys")
    assert (first["event_id"], first["security_id"]) == ("7", "ünï\n")
    assert (inner["event_id"], inner["job_id"]) == ("7", 9)
    assert "event_id" not in outside
    assert "ValueError: two\nlines" in str(outside["error"])


def test_the_configuration_is_one_that_python_takes() -> None:
    before = logging.root.handlers[:], logging.root.level
    try:
        logging.config.dictConfig(logs.configuration())
        assert isinstance(logging.root.handlers[0].formatter, logs.JsonFormatter)
    finally:
        logging.root.handlers[:], level = before
        logging.root.setLevel(level)
