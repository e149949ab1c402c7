"""`/dead-letters`: what was refused and why; one record with its error; sent again after repair."""

from __future__ import annotations

from aiohttp import web

from sinks.ranges import PARTITION
from streams.metrics import DEAD_LETTER_REASONS as REASONS
from streams.web import access, parameters, render
from streams.web.letters import Letters
from streams.web.problems import Problem

_PAGE = 50


class DeadLetters:
    """The list and the single letter."""

    def __init__(self, letters: Letters) -> None:
        self._letters = letters

    def add_routes(self, application: web.Application) -> None:
        """Mount both."""
        application.router.add_get("/dead-letters", self.show_all)
        application.router.add_get("/dead-letters/{partition}/{offset}", self.show)
        application.router.add_post("/dead-letters/{partition}/{offset}", self.resubmit)

    async def show_all(self, request: web.Request) -> web.StreamResponse:
        """Newest first, a page at a time."""
        reason = parameters.choice(request.query, "reason", REASONS)
        found, cursor = await self._letters.page(_PAGE, reason, request.query.get("cursor", ""))
        following = request.rel_url.update_query(cursor=cursor) if cursor else None
        return render.page(
            request, "dead_letters.html", letters=found, reasons=REASONS, reason=reason, following=following
        )

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The record as received, the error, and the form to repair it."""
        partition, offset = _place(request)
        letter = await self._letters.one(partition, offset)
        return render.page(request, "dead_letter.html", letter=letter, problem="", value=letter.value)

    async def resubmit(self, request: web.Request) -> web.StreamResponse:
        """Send it again; what would be refused again is said at once, with the text kept."""
        partition, offset = _place(request)
        actor, form = access.operator(request), await parameters.form(request, free=("value",))
        value = form.get("value", "").replace("\r\n", "\n")
        try:
            await self._letters.resubmit(actor, partition, offset, value)
        except Problem as problem:
            if problem.name != "refused":
                raise
            letter = await self._letters.one(partition, offset)
            return render.page(
                request, "dead_letter.html", status=409, letter=letter, problem=problem.detail, value=value
            )
        raise web.HTTPSeeOther(f"/dead-letters/{partition}/{offset}")


def _place(request: web.Request) -> tuple[int, int]:
    partition = parameters.number_segment(request, "partition", PARTITION)
    return partition, parameters.number_segment(request, "offset")
