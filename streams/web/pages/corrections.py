"""`/corrections`: the ledger with filters; `/corrections/SEQ`: one correction from arrival until right."""

from __future__ import annotations

from aiohttp import web

from sinks import ledger, operations, progress
from streams.app import App
from streams.web import parameters, render
from streams.web.problems import Problem

_PAGE = 100
AGES = ((60, "1 minute"), (600, "10 minutes"), (3600, "1 hour"), (86400, "1 day"))


class Corrections:
    """The list and the single page."""

    def __init__(self, app: App) -> None:
        self._app = app

    def add_routes(self, application: web.Application) -> None:
        """Mount both."""
        application.router.add_get("/corrections", self.show_all)
        application.router.add_get("/corrections/{seq}", self.show)

    async def show_all(self, request: web.Request) -> web.StreamResponse:
        """Newest first, a page at a time."""
        wanted, before = parameters.corrections_filter(request.query), parameters.number(request.query, "cursor")
        async with (await self._app.pool()).acquire() as connection:
            found = await ledger.corrections(connection, wanted, before, _PAGE + 1)
        following = request.rel_url.update_query(cursor=str(found[_PAGE - 1].seq)) if len(found) > _PAGE else None
        return render.page(
            request,
            "corrections.html",
            corrections=found[:_PAGE],
            wanted=wanted,
            statuses=ledger.STATUSES,
            ages=AGES,
            following=following,
        )

    async def show(self, request: web.Request) -> web.StreamResponse:
        """One; with `?part=live` only what changes while it is worked on."""
        seq = parameters.number_segment(request, "seq")
        async with (await self._app.pool()).acquire() as connection:
            found = await progress.correction_progress(connection, seq)
            if found is None:
                raise Problem("not-found", f"there is no correction {seq}")
            limit = await operations.limit_state(connection)
            steps = await ledger.milestones(connection, seq)
            if request.query.get("part") == "live":
                return render.page(request, "correction_live.html", found=found, limit=limit, steps=steps)
            holders = await ledger.largest_holders(connection, found.security_id)
            corrected = await ledger.corrected_prices(connection, seq)
            changed = await ledger.changed_values(connection, seq)
            prices = await ledger.prices_around(connection, found.security_id, found.earliest_date)
            others = await progress.security_progress(connection, found.security_id, 6)
        return render.page(
            request,
            "correction.html",
            found=found,
            limit=limit,
            steps=steps,
            holders=holders,
            corrected=corrected,
            changed=changed,
            prices=prices,
            others=[each for each in others if each.seq != seq][:5],
        )
