"""`/tables`: the trigger table over all workers, one security's entry and holder, and how the ledger sees it."""

from __future__ import annotations

from aiohttp import web

from sinks import progress
from streams.app import App
from streams.web import render
from streams.web.table_reader import TableReader

_PAGE = 200


class Tables:
    """Browse and look up."""

    def __init__(self, app: App, table: TableReader) -> None:
        self._app = app
        self._table = table

    def add_routes(self, application: web.Application) -> None:
        """Mount the page."""
        application.router.add_get("/tables", self.show)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """`?security_id=` looks one up; without it, all entries by id."""
        security_id = request.query.get("security_id", "")
        if security_id:
            return await self._one(request, security_id)
        rows = await self._table.browse(request, request.query.get("cursor", ""), _PAGE + 1)
        following = request.rel_url.update_query(cursor=rows[_PAGE - 1]["security_id"]) if len(rows) > _PAGE else None
        for row in rows:
            row["partition"] = self._table.partition(row["security_id"])
        return render.page(request, "tables.html", rows=rows[:_PAGE], following=following, security_id="")

    async def _one(self, request: web.Request, security_id: str) -> web.StreamResponse:
        entry, holder = await self._table.look_up(request, security_id)
        async with (await self._app.pool()).acquire() as connection:
            ledger = await progress.security_progress(connection, security_id, 20)
        waiting = [each for each in ledger if each.phase in ("WAITING", "RESETTING")]
        if entry is None:
            verdict = "differs" if waiting else "agrees"
        else:
            covered = max(each["seq"] for each in (entry["in_flight"], entry["pending"]) if each)
            verdict = "agrees" if all(each.seq <= covered for each in waiting) and waiting else "differs"
        return render.page(
            request,
            "table_entry.html",
            security_id=security_id,
            entry=entry,
            holder=holder,
            partition=self._table.partition(security_id),
            ledger=ledger,
            verdict=verdict,
        )
