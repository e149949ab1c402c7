"""`/`: the state of the books on one page, live."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from streams.app import App
from streams.web import render
from streams.web.problems import unavailable
from streams.web.sampler import Sample, Sampler

_FIRST_SECONDS = 10.0
_HEARTBEAT_SECONDS = 5.0  # a stream notices within so long that its reader has gone


class Overview:
    """Renders the sampler's latest sample; readers share it."""

    def __init__(self, app: App, sampler: Sampler) -> None:
        self._app = app
        self._sampler = sampler

    def add_routes(self, application: web.Application) -> None:
        """Mount the page and its stream."""
        application.router.add_get("/", self.show)
        application.router.add_get("/events/overview", self.stream)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The whole page."""
        self._sampler.look()
        sample = self._sampler.latest or await self._first()
        return render.page(request, "overview.html", live=True, **self._values(sample))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The page's live part as server-sent events, one per sample."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        try:
            while not self._app.should_stop:
                self._sampler.look()
                if self._sampler.latest:
                    text = render.fragment("overview_live.html", **self._values(self._sampler.latest))
                    data = "".join(f"data: {line}\n" for line in text.splitlines())
                    await response.write(f"event: overview\n{data}\n".encode())
                await self._next()
                await response.write(b": still here\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            pass
        return response

    async def _next(self) -> None:
        try:
            async with asyncio.timeout(_HEARTBEAT_SECONDS), self._sampler.changed:
                await self._sampler.changed.wait()
        except TimeoutError:
            pass

    async def _first(self) -> Sample:
        try:
            async with asyncio.timeout(_FIRST_SECONDS), self._sampler.changed:
                while self._sampler.latest is None:
                    await self._sampler.changed.wait()
        except TimeoutError:
            raise unavailable("the database has not answered yet") from None
        return self._sampler.latest

    def _values(self, sample: Sample) -> dict[str, Any]:
        rate = self._app.settings.reset_rows_per_second
        return {"sample": sample, "charts": self._sampler.charts(), "default_rate": rate}
