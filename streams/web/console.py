"""The console and the API of the `triggers` worker, mounted on Faust's own web server."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from aiohttp import web

from streams.app import App
from streams.web.api import Api
from streams.web.letters import Letters
from streams.web.pages import actions, corrections, dead_letters, key, overview, tables
from streams.web.sampler import Sampler
from streams.web.table_reader import TableReader
from tables.triggers import Entry

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def add_pages(app: App, table: Any, decode: Callable[[bytes], Entry]) -> None:
    """Mount everything. decode: a value of the trigger table to the entry."""
    application: web.Application = app.web.web_app
    reader, letters, sampler = TableReader(app, table, decode), Letters(app), Sampler(app)
    overview.Overview(app, sampler).add_routes(application)  # `/` before Faust mounts its own
    corrections.Corrections(app).add_routes(application)
    actions.Actions(app).add_routes(application)
    key.Key(app).add_routes(application)
    tables.Tables(app, reader).add_routes(application)
    dead_letters.DeadLetters(letters).add_routes(application)
    Api(app, reader, letters).add_routes(application)
    app.access.add_pages(application)
    application.router.add_get("/static/{name}", _static)
    app.from_start(sampler.run)


async def _static(request: web.Request) -> web.StreamResponse:
    """A vendored file; the package may be zipped."""
    name = request.match_info["name"]
    folder = resources.files("streams.web").joinpath("static")
    found = next((each for each in folder.iterdir() if each.name == name), None)
    kind = next((kind for ending, kind in _TYPES.items() if name.endswith(ending)), None)
    if found is None or kind is None:
        raise web.HTTPNotFound
    return web.Response(
        body=found.read_bytes(), content_type=kind, charset="utf-8", headers={"Cache-Control": "max-age=300"}
    )
