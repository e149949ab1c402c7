"""Who may do what where no token is set; and session cookies, without a browser."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from streams.settings import load_named
from streams.web.access import Access, local_path, protect
from streams.web.problems import answer_problems


@asynccontextmanager
async def console(**settings: Any) -> AsyncIterator[TestClient[Any, Any]]:
    """A console with one page."""
    access = Access(load_named(**settings))
    application = web.Application(middlewares=[protect, answer_problems, access.middleware()])  # type: ignore[list-item]

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="done")

    application.router.add_route("*", "/thing", page)
    access.add_pages(application)
    async with TestClient(TestServer(application)) as client:
        yield client


async def test_without_a_token_reading_is_free_and_nothing_can_be_changed() -> None:
    async with console() as client:
        assert (await client.get("/thing")).status == 200
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await client.request(method, "/thing", headers={"Authorization": "Bearer x"})
            assert (answer.status, (await answer.json())["type"]) == (403, "urn:tidemark:problem:forbidden")
        origin = f"http://127.0.0.1:{client.port}"
        answer = await client.post("/login", data={"name": "A", "token": ""}, headers={"Origin": origin})
        assert answer.status == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:6066", ""])
async def test_a_name_made_to_point_here_is_refused(host: str) -> None:
    async with console() as client:
        assert (await client.get("/thing", headers={"Host": host})).status == 403
        for own in ("127.0.0.1:1", "localhost", "[::1]:6066"):
            assert (await client.get("/thing", headers={"Host": own})).status == 200


async def test_headers_are_on_every_answer() -> None:
    async with console(web_token="t") as client:
        for path in ("/thing", "/nothing", "/login"):
            answer = await client.get(path, allow_redirects=False)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:x", ""])
def test_a_login_leads_nowhere_else(target: str) -> None:
    assert local_path(target) == "/"
    assert local_path("/corrections?status=OPEN") == "/corrections?status=OPEN"
