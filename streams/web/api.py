"""The JSON API (contract, Web); described in openapi.json beside this file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib import resources
from typing import Any

from aiohttp import web

from sinks import actions, ledger, monitor, operations, progress, roster
from sinks.database import Connection
from sinks.ranges import PARTITION, PRIORITY, RESET_RATE, SEQUENCE
from streams.app import App
from streams.lag import LagUnknown, read_lag
from streams.metrics import DEAD_LETTER_REASONS as REASONS
from streams.web import access, parameters
from streams.web.letters import Letters
from streams.web.parameters import (
    answer,
    body,
    checked,
    choice,
    limit,
    next_page,
    number,
    number_segment,
    rows,
    segment,
)
from streams.web.problems import Problem, unavailable
from streams.web.table_reader import FORWARDED, PARTITIONS, TableReader

_JOB_STATUSES = ("PENDING", "PROCESSING", "COMPLETE", "FAILED", "CANCELLED")
_SHOWN_CORRECTIONS = 20


class Api:
    """The handlers; each is one question to the table, to Postgres, or to Kafka."""

    def __init__(self, app: App, table: TableReader, letters: Letters) -> None:
        self._app = app
        self._table = table
        self._letters = letters

    def add_routes(self, application: web.Application) -> None:
        """Mount everything below /api. Without a pattern of its own, an identifier with braces would match none."""
        get, post = application.router.add_get, application.router.add_post
        get("/api/openapi.json", self.describe)
        get("/api/triggers", self.triggers)
        get("/api/triggers/{security_id:[^/]+}", self.trigger)
        get("/api/securities/{security_id:[^/]+}", self.security)
        get("/api/portfolios/{portfolio_id:[^/]+}/securities/{security_id:[^/]+}", self.key)
        get("/api/corrections", self.corrections)
        get("/api/corrections/{seq}", self.correction)
        get("/api/corrections/{seq}/effect", self.effect)
        get("/api/jobs", self.jobs)
        get("/api/jobs/{job_id}", self.job)
        post("/api/jobs/{job_id}/{action:cancel|requeue|prioritise}", self.act_on_job)
        get("/api/limit", self.reset_limit)
        post("/api/limit", self.set_limit)
        get("/api/lag", self.lag)
        get("/api/workers", self.workers)
        get("/api/actions", self.actions)
        get("/api/dead-letters", self.dead_letters)
        get("/api/dead-letters/{partition}/{offset}", self.dead_letter)
        post("/api/dead-letters/{partition}/{offset}/resubmit", self.resubmit)

    async def describe(self, request: web.Request) -> web.StreamResponse:
        """The OpenAPI document."""
        text = resources.files("streams.web").joinpath("openapi.json").read_text(encoding="utf-8")
        return web.Response(text=text, content_type="application/json")

    # -- the table -------------------------------------------------------------------------------------------------

    async def triggers(self, request: web.Request) -> web.StreamResponse:
        """Entries of all partitions, in order of security_id; for another worker, this one's only."""
        if only := request.query.get("security_id"):
            row, _ = await self._table.look_up(request, only)
            return answer([row] if row else [])
        size, after = limit(request), request.query.get("cursor", request.query.get("after", ""))
        if FORWARDED in request.headers:
            found, covered = self._table.browse_here(after, size)
            return answer(found, {PARTITIONS: ",".join(str(partition) for partition in sorted(covered))})
        found = await self._table.browse(request, after, size)
        return rows(request, found, size, found[-1]["security_id"] if found else None)

    async def trigger(self, request: web.Request) -> web.StreamResponse:
        """One entry, from the worker that holds it."""
        security_id = segment(request, "security_id")
        found, _ = await self._table.look_up(request, security_id)
        if found is None:
            raise Problem("not-found", f"nothing is in flight or pending for {security_id}")
        return answer(found)

    # -- the books -------------------------------------------------------------------------------------------------

    async def security(self, request: web.Request) -> web.StreamResponse:
        """How far the security's corrections are; the first open one, or the latest, is also given at the top."""
        security_id = segment(request, "security_id")
        known = await self._ask(lambda c: ledger.security(c, security_id))
        if known is None:
            raise Problem("not-found", f"security {security_id} has no price and no position")
        found = await self._ask(lambda c: progress.security_progress(c, security_id, _SHOWN_CORRECTIONS))
        first = asdict(found[0]) if found else {}
        return answer({**known, **first, "security_id": security_id, "corrections": [asdict(each) for each in found]})

    async def key(self, request: web.Request) -> web.StreamResponse:
        """One key with its live history, the latest rows; the header links to those before."""
        portfolio_id, security_id = segment(request, "portfolio_id"), segment(request, "security_id")
        size, before = limit(request), number(request.query, "cursor", SEQUENCE)
        found = await self._ask(lambda c: monitor.read_key(c, portfolio_id, security_id, before=before, limit=size + 1))
        if found is None:
            raise Problem("not-found", f"portfolio {portfolio_id} has never held {security_id}")
        shown = found["history"][-size:]
        more = str(shown[0]["sequence"]) if len(found["history"]) > size else None
        return answer({**found, "history": shown}, next_page(request, more))

    async def corrections(self, request: web.Request) -> web.StreamResponse:
        """The ledger, newest first."""
        size = limit(request)
        wanted, before = parameters.corrections_filter(request.query), number(request.query, "cursor")
        found = await self._ask(lambda c: ledger.corrections(c, wanted, before, size))
        return rows(request, [asdict(each) for each in found], size, str(found[-1].seq) if found else None)

    async def correction(self, request: web.Request) -> web.StreamResponse:
        """One correction's progress."""
        seq = number_segment(request, "seq")
        found = await self._ask(lambda c: progress.correction_progress(c, seq))
        if found is None:
            raise Problem("not-found", f"there is no correction {seq}")
        return answer(asdict(found))

    async def effect(self, request: web.Request) -> web.StreamResponse:
        """What a late price replaced, and what that changed for the largest holders."""
        seq = number_segment(request, "seq")
        if await self._ask(lambda c: progress.correction_progress(c, seq)) is None:
            raise Problem("not-found", f"there is no correction {seq}")
        size = limit(request)
        prices = await self._ask(lambda c: ledger.corrected_prices(c, seq, size))
        return answer({"prices": prices, "holders": await self._ask(lambda c: ledger.changed_values(c, seq, size))})

    # -- jobs and their rate ---------------------------------------------------------------------------------------

    async def jobs(self, request: web.Request) -> web.StreamResponse:
        """Jobs, newest first."""
        size, before = limit(request, 200), number(request.query, "cursor")
        status = parameters.choice(request.query, "status", _JOB_STATUSES)
        found = await self._ask(
            lambda c: operations.list_jobs(
                c,
                statuses=[status] if status else None,
                security_id=request.query.get("security_id") or None,
                before=before,
                limit=size,
            )
        )
        return rows(request, found, size, str(found[-1]["job_id"]) if found else None)

    async def job(self, request: web.Request) -> web.StreamResponse:
        """One job with the corrections it covers."""
        job_id = number_segment(request, "job_id")
        try:
            return answer(await self._ask(lambda c: operations.show_job(c, job_id)))
        except operations.Refused as error:
            raise Problem("not-found", str(error)) from None

    async def act_on_job(self, request: web.Request) -> web.StreamResponse:
        """cancel, requeue, prioritise."""
        actor, job_id = access.operator(request), number_segment(request, "job_id")
        match request.match_info["action"]:
            case "cancel":
                found = await self._act(lambda c: operations.cancel_job(c, actor, job_id))
            case "requeue":
                found = await self._act(lambda c: operations.requeue_job(c, actor, job_id))
            case _:
                wanted = (await body(request, ("priority",))).get("priority")
                priority = checked("priority", lambda: PRIORITY.check(wanted))
                found = await self._act(lambda c: operations.prioritise_job(c, actor, job_id, priority))
        return answer(found)

    async def reset_limit(self, request: web.Request) -> web.StreamResponse:
        """The reset rate."""
        return answer(_limit(await self._ask(operations.limit_state)))

    async def set_limit(self, request: web.Request) -> web.StreamResponse:
        """`rows_per_second`, `paused`, or both."""
        actor, wanted = access.operator(request), await body(request, ("rows_per_second", "paused"))
        rate, paused = wanted.get("rows_per_second"), wanted.get("paused")
        if rate is None and paused is None:
            raise Problem("invalid", "name rows_per_second, paused, or both")
        if rate is not None:
            checked("rows_per_second", lambda: RESET_RATE.check(rate))
        if paused is not None and not isinstance(paused, bool):
            raise Problem("invalid", "paused: true or false")
        first = self._app.settings.reset_rows_per_second
        if rate is not None:
            await self._act(lambda c: operations.throttle(c, actor, float(rate)))
        if paused is not None:
            change = operations.pause if paused else operations.resume
            await self._act(lambda c: change(c, actor, first))
        return answer(_limit(await self._ask(operations.limit_state)))

    async def actions(self, request: web.Request) -> web.StreamResponse:
        """What operators did, newest first."""
        size = limit(request, 200)
        return answer(await self._ask(lambda c: actions.latest(c, size)))

    # -- the installation ------------------------------------------------------------------------------------------

    async def lag(self, request: web.Request) -> web.StreamResponse:
        """The same as `tidemark lag`."""
        try:
            found = await self._ask(lambda c: read_lag(self._app.settings, c))
        except LagUnknown as error:
            raise unavailable(str(error)) from None
        return answer([asdict(each) for each in found])

    async def workers(self, request: web.Request) -> web.StreamResponse:
        """Who works, as each reports itself."""
        return answer([asdict(each) for each in await self._ask(roster.read)])

    async def dead_letters(self, request: web.Request) -> web.StreamResponse:
        """The latest refused records, newest first, long texts cut; the header links to those before."""
        size, reason = limit(request, 100), choice(request.query, "reason", REASONS)
        found, cursor = await self._letters.page(size, reason, request.query.get("cursor", ""))
        return answer([asdict(each) for each in found], next_page(request, cursor))

    async def dead_letter(self, request: web.Request) -> web.StreamResponse:
        """One refused record, whole."""
        partition, offset = number_segment(request, "partition", PARTITION), number_segment(request, "offset")
        return answer(asdict(await self._letters.one(partition, offset)))

    async def resubmit(self, request: web.Request) -> web.StreamResponse:
        """Send the record again, with another `value` where the body has one."""
        actor = access.operator(request)
        partition, offset = number_segment(request, "partition", PARTITION), number_segment(request, "offset")
        value = (await body(request, ("value",))).get("value")
        if value is not None and not isinstance(value, str):
            raise Problem("invalid", "value: the record's text")
        await self._letters.resubmit(actor, partition, offset, value)
        return answer({"resubmitted": True})

    async def _ask(self, query: Callable[[Connection], Awaitable[Any]]) -> Any:
        async with (await self._app.pool()).acquire() as connection:
            return await query(connection)

    async def _act(self, change: Callable[[Connection], Awaitable[Any]]) -> Any:
        try:
            done = await self._ask(change)
        except operations.Refused as error:
            raise Problem("refused", str(error)) from None
        self._app.outbox_written()
        return done


def _limit(state: operations.LimitState | None) -> dict[str, Any]:
    return {**asdict(state), "in_force": state.in_force} if state else {"rows_per_second": None, "paused": False}
