"""Who may do what: reading needs the token where one is set; actions need it always (contract, Web and Settings).

Programs send it as a bearer token. Browsers exchange it once for a session cookie that scripts cannot read and other
sites cannot send; a request that changes something must also come from the console's own pages (Origin).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from urllib.parse import quote, unquote, urlsplit

from aiohttp import web

from streams.settings import Settings
from streams.web import parameters, render
from streams.web.links import local_path
from streams.web.problems import Handler, Problem, wants_page
from streams.web.render import OPERATOR

COOKIE = "tidemark_session"
ACTOR = "X-Tidemark-Actor"
_SESSION_SECONDS = 12 * 3600
_WRONG_TOKEN_SECONDS = 0.5
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OPEN = frozenset({"/healthz", "/readyz", "/login"})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@web.middleware
async def protect(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Headers that keep browsers from doing what no page here needs; on every answer."""
    try:
        response = await handler(request)
    except web.HTTPException as redirect:
        redirect.headers.update(_HEADERS)
        raise
    if not response.prepared:
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
    return response


class Access:
    """The rules of one worker. token None: reading is free on the loopback, and nothing can be changed."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.web_token.get_secret_value().encode() if settings.web_token else None
        self._hosts = _LOOPBACK | {settings.web_host}
        self._has_login = False

    def middleware(self) -> object:
        """For the worker's web application."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            operator = self._operator(request)
            if operator:
                request[OPERATOR] = operator
            self._check(request, operator)
            return await handler(request)

        return guard

    def _check(self, request: web.Request, operator: str | None) -> None:
        path = request.path
        if path in _OPEN or path.startswith("/static/"):
            return self._check_origin(request) if request.method not in _SAFE else None
        if self._token is None:
            if _hostname(request.host) not in self._hosts:  # a name that was made to point here (DNS rebinding)
                raise Problem("forbidden", f"this console answers on {', '.join(sorted(self._hosts))} only")
            if request.method not in _SAFE:
                raise Problem("forbidden", "actions are disabled: start the workers with TIDEMARK_WEB_TOKEN set")
        elif operator is None:
            if self._has_login and wants_page(request) and request.method in _SAFE:
                raise web.HTTPSeeOther(f"/login?next={quote(request.raw_path, safe='')}")
            raise Problem("unauthorized", "send the token as `Authorization: Bearer …`, or log in")
        elif request.method not in _SAFE and "Authorization" not in request.headers:
            self._check_origin(request)

    def _check_origin(self, request: web.Request) -> None:
        origin = _place(request.headers.get("Origin", ""))
        if not origin or origin != request.host:
            raise Problem("forbidden", "the request does not come from this console's own pages")

    def _operator(self, request: web.Request) -> str | None:
        if self._token is None:
            return None
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            right = hmac.compare_digest(_bytes(given.strip()), self._token)
            return _name(request.headers.get(ACTOR, "")) or "api" if right else None
        return self._session(request.cookies.get(COOKIE, ""))

    # -- sessions: nothing is stored, so that every worker knows them ----------------------------------------------

    def _session(self, cookie: str) -> str | None:
        signed, _, signature = cookie.rpartition(".")
        if not signed or not hmac.compare_digest(self._sign(signed).encode(), _bytes(signature)):
            return None
        until, _, name = signed.partition(".")
        return unquote(name) if time.time() < int(until) else None

    def _sign(self, text: str) -> str:
        assert self._token is not None
        return hmac.new(self._token, b"session " + _bytes(text), hashlib.sha256).hexdigest()

    def add_pages(self, application: web.Application) -> None:
        """`/login` and `/logout`."""
        self._has_login = True
        application.router.add_get("/login", self._ask)
        application.router.add_post("/login", self._log_in)
        application.router.add_post("/logout", self._log_out)

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        return self._form(request, local_path(request.query.get("next", "/")))

    async def _log_in(self, request: web.Request) -> web.StreamResponse:
        form = await parameters.form(request, free=("name", "token", "next"))
        target, token = local_path(form.get("next", "/")), form.get("token", "")
        name = _name(form.get("name", ""))
        if self._token is None:
            raise Problem("forbidden", "no token is set: start the workers with TIDEMARK_WEB_TOKEN")
        if not name:
            return self._form(request, target, "Your name is needed: it is written beside every action.")
        if not hmac.compare_digest(token.encode(), self._token):
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
            return self._form(request, target, "That is not the token.")
        signed = f"{int(time.time()) + _SESSION_SECONDS}.{quote(name, safe='')}"
        response = web.HTTPSeeOther(target)
        response.set_cookie(
            COOKIE,
            f"{signed}.{self._sign(signed)}",
            max_age=_SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=request.secure,
            path="/",
        )
        return response

    async def _log_out(self, request: web.Request) -> web.StreamResponse:
        response = web.HTTPSeeOther("/login")
        response.del_cookie(COOKIE, path="/")
        return response

    def _form(self, request: web.Request, target: str, problem: str = "") -> web.StreamResponse:
        status = 403 if problem else 200
        return render.page(
            request, "login.html", status=status, target=target, problem=problem, enabled=self._token is not None
        )


def operator(request: web.Request) -> str:
    """Who acts. Raises Problem where nobody has shown the token."""
    if OPERATOR not in request:
        raise Problem("forbidden", "actions need the token")
    return request[OPERATOR]


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # an IPv6 address that is none
        return ""


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _bytes(text: str) -> bytes:
    """What the client sent, whichever bytes they are."""
    return text.encode("utf-8", "surrogateescape")


def _name(given: str) -> str:
    return "".join(character for character in given if character.isprintable()).strip()[:100]
