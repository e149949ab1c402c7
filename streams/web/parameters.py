"""Parameters of requests, checked; and the links to the next page (RFC 8288)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from sinks import ledger
from streams.web.problems import Problem

LARGEST_PAGE = 10_000
_encoder = msgspec.json.Encoder(decimal_format="number")


def limit(request: web.Request, default: int = 1_000) -> int:
    """How many rows at most."""
    return _bounded(request, "limit", default, 1, LARGEST_PAGE)


def integer(values: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A whole number of a query or a form that may be absent."""
    text = values.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) > 2**63 - 1:
        raise Problem("invalid", f"{name}: expected a whole number, got {text!r}")
    return int(text)


def segment(request: web.Request, name: str) -> str:
    """An identifier in the path, with any characters. Raises Problem `invalid` for what Postgres cannot hold."""
    text = request.match_info[name]
    if not text or "\x00" in text or (not text.isprintable() and any(ord(c) < 32 for c in text)):
        raise Problem("invalid", f"{name}: an identifier is not empty and has no control characters")
    return text


def number_segment(request: web.Request, name: str) -> int:
    """A number in the path."""
    text = request.match_info[name]
    if not text.isdecimal() or int(text) > 2**63 - 1:
        raise Problem("not-found", f"{name} is a number, got {text!r}")
    return int(text)


def choice(values: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str | None:
    """One of the allowed values of a query or a form, or None where it is absent."""
    value = values.get(name, "")
    if value and value not in allowed:
        raise Problem("invalid", f"{name}: one of {', '.join(allowed)}, got {value!r}")
    return value or None


def corrections_filter(values: Mapping[str, Any]) -> ledger.Filter:
    """Which corrections, in a query or a form."""
    return ledger.Filter(
        choice(values, "status", ledger.STATUSES),
        values.get("security_id") or None,
        integer(values, "older_than_seconds"),
    )


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request that changes something; nothing is an empty one."""
    text = await request.text()
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise Problem("invalid", f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Problem("invalid", "the body is not a JSON object")
    return found


def answer(value: Any, headers: dict[str, str] | None = None) -> web.Response:
    """JSON: decimals as numbers with every digit, dates as ISO text."""
    return web.Response(body=_encoder.encode(value), content_type="application/json", headers=headers)


def rows(request: web.Request, found: list[Any], size: int, cursor: str | None) -> web.Response:
    """A page of rows; a full one links to the next, which begins after the cursor."""
    headers = {}
    if len(found) == size and cursor is not None:
        following = request.rel_url.update_query(cursor=cursor)
        headers["Link"] = f'<{following}>; rel="next"'
    return answer(found, headers)


def _bounded(request: web.Request, name: str, default: int, smallest: int, largest: int) -> int:
    value = integer(request.query, name, default)
    assert value is not None
    if not smallest <= value <= largest:
        raise Problem("invalid", f"{name}: from {smallest} to {largest}, got {value}")
    return value
