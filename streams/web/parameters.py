"""Parameters of requests, checked; and the links to the next page (RFC 8288)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web
from aiohttp.http import HttpProcessingError

from sinks import ledger, ranges
from sinks.ranges import OutOfRange, Whole
from streams.web.links import from_segment
from streams.web.problems import Handler, Problem

LARGEST_BODY = 4 * 2**20
"""Bytes. A dead letter of 1 MiB is sent again as a form, in which a character may take three."""

_MOST_FIELDS = 100
_UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_encoder = msgspec.json.Encoder(decimal_format="number")
T = TypeVar("T")


@web.middleware
async def readable(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a path or a query that is not text: identifiers have no control characters, and Postgres holds no NUL."""
    for part in (request.raw_path, request.path, *request.query, *request.query.values()):
        if _UNREADABLE.search(part):
            raise Problem("invalid", "the address has control characters, or bytes that are not UTF-8")
    return await handler(request)


def limit(request: web.Request, default: int = 1_000) -> int:
    """How many rows at most."""
    found = number(request.query, "limit", ranges.PAGE)
    return default if found is None else found


def number(values: Mapping[str, Any], name: str, numbers: Whole = ranges.ID) -> int | None:
    """A whole number of a query or a form; None where it is absent."""
    text = values.get(name, "")
    return checked(name, lambda: numbers.parse(text)) if text else None


def checked(name: str, read: Callable[[], T], problem: str = "invalid") -> T:
    """What `read` gives. Raises Problem with the range where the number lies outside of it."""
    try:
        return read()
    except OutOfRange as error:
        raise Problem(problem, f"{name}: {error}") from None


def segment(request: web.Request, name: str) -> str:
    """An identifier in the path, with any characters."""
    return from_segment(request.match_info[name])


def number_segment(request: web.Request, name: str, numbers: Whole = ranges.ID) -> int:
    """A number in the path; there is nothing under any other text."""
    return checked(name, lambda: numbers.parse(request.match_info[name]), "not-found")


def choice(values: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str | None:
    """One of the allowed values of a query or a form, or None where it is absent."""
    value = values.get(name, "")
    if value and value not in allowed:
        raise Problem("invalid", f"{name}: one of {', '.join(allowed)}, got {value[:60]!r}")
    return value or None


def corrections_filter(values: Mapping[str, Any]) -> ledger.Filter:
    """Which corrections, in a query or a form."""
    return ledger.Filter(
        choice(values, "status", ledger.STATUSES),
        values.get("security_id") or None,
        number(values, "older_than_seconds", ranges.AGE),
    )


async def body(request: web.Request, known: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object of a request that changes something; nothing is an empty one. known: the fields it may have."""
    raw = await _read(request)
    try:
        found = msgspec.json.decode(raw) if raw.strip() else {}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Problem("invalid", f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Problem("invalid", "the body is not a JSON object")
    if unknown := sorted(set(found) - set(known)):
        raise Problem("invalid", f"unknown: {unknown[0][:60]!r}; known: {', '.join(known) or 'nothing'}")
    if empty := sorted(name for name, value in found.items() if value is None):
        raise Problem("invalid", f"{empty[0]}: null; leave it out instead")
    return found


async def form(request: web.Request, free: Collection[str] = ()) -> dict[str, str]:
    """The fields of a form. free: those whose text may have line breaks and other control characters."""
    raw = await _read(request)
    try:
        pairs = parse_qsl(raw.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise Problem("invalid", "the form is not UTF-8, or has too many fields") from None
    found = dict(pairs)
    if any(_UNREADABLE.search(name) or (name not in free and _UNREADABLE.search(found[name])) for name in found):
        raise Problem("invalid", "the form has control characters")
    return found


async def _read(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise Problem("invalid", f"the body cannot be read: {type(error).__name__}") from None


def answer(value: Any, headers: dict[str, str] | None = None) -> web.Response:
    """JSON: decimals as numbers with every digit, dates as ISO text."""
    return web.Response(body=_encoder.encode(value), content_type="application/json", headers=headers)


def rows(request: web.Request, found: list[Any], size: int, cursor: str | None) -> web.Response:
    """A page of rows; a full one links to the next, which begins after the cursor."""
    return answer(found, next_page(request, cursor if len(found) == size else None))


def next_page(request: web.Request, cursor: str | None) -> dict[str, str]:
    """The header that links to the page after the cursor; none where nothing comes."""
    if cursor is None:
        return {}
    return {"Link": f'<{request.rel_url.update_query(cursor=cursor)}>; rel="next"'}
