"""Errors as the web gives them: `application/problem+json` (RFC 9457), with types that stay, or a page for browsers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from sinks.database import is_transient
from streams.visible import visible
from streams.web import render

logger = logging.getLogger(__name__)

RETRY_SECONDS = "1"
_JSON_PATHS = ("/api", "/metrics", "/healthz", "/readyz", "/table", "/router")
_TITLES = {
    "unauthorized": (401, "A token is needed"),
    "forbidden": (403, "Not allowed"),
    "not-found": (404, "Not found"),
    "method-not-allowed": (405, "Method not allowed"),
    "refused": (409, "The action cannot be done"),
    "too-large": (413, "The body is too large"),
    "invalid": (400, "A parameter is wrong"),
    "internal": (500, "This is a bug"),
    "unavailable": (503, "Not now"),
}
TYPES = {name: f"urn:tidemark:problem:{name}" for name in _TITLES}
_FAUST = ("/table/", "/router/")
_BY_STATUS = {status: name for name, (status, _) in _TITLES.items()}


class Problem(Exception):  # noqa: N818 - an answer
    """name: one of the types; detail: one line for whoever asked."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(detail)
        self.name = name
        self.detail = detail


def unavailable(detail: str) -> Problem:
    """The same request will work a moment later."""
    return Problem("unavailable", detail)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error that leaves a handler becomes an answer; only bugs are logged with their trace."""
    try:
        response = await handler(request)
    except Problem as problem:
        return _answer(request, problem)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        name = _BY_STATUS.get(error.status)
        return _answer(request, Problem(name, f"{request.method} {request.path}")) if name else error
    except ConnectionResetError:
        raise
    except Exception as error:
        if is_transient(error):
            return _answer(request, unavailable(f"the database does not answer: {type(error).__name__}"))
        if isinstance(error, KeyError) and request.path.startswith(_FAUST):  # Faust's own views of a table
            return _answer(request, Problem("not-found", "there is no such table, or nothing under that key"))
        logger.exception("%s %s", request.method, request.raw_path)
        return _answer(request, Problem("internal", f"{type(error).__name__}; the worker's log has the trace"))
    if response.status == 503 and not response.prepared:
        response.headers.setdefault("Retry-After", RETRY_SECONDS)
    return response


def _answer(request: web.Request, problem: Problem) -> web.Response:
    status, title = _TITLES[problem.name]
    headers = {"Retry-After": RETRY_SECONDS} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="tidemark"'
    if wants_page(request):
        return render.page(request, "problem.html", status=status, headers=headers, title=title, detail=problem.detail)
    body: dict[str, Any] = {
        "type": TYPES[problem.name],
        "title": title,
        "status": status,
        "detail": problem.detail,
        "instance": visible(request.raw_path),
    }
    return web.json_response(body, status=status, headers=headers, content_type="application/problem+json")


def wants_page(request: web.Request) -> bool:
    """Whether a person looks at the answer."""
    return not request.path.startswith(_JSON_PATHS) and "text/html" in request.headers.get("Accept", "")
