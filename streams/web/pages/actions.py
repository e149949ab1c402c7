"""What operators do: each action is confirmed on a page that says what will happen, done, and written down."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from sinks import actions, ledger, operations
from sinks.database import Connection
from sinks.ranges import PRIORITY, RESET_RATE
from streams.app import App
from streams.web import access, parameters, render
from streams.web.links import local_path
from streams.web.problems import Problem

_MOST_AT_ONCE = 10_000
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Action:
    """What the operator reads before agreeing. on_jobs: acts on one job or on all that match a filter."""

    title: str
    consequence: str
    button: str
    on_jobs: bool
    job_statuses: frozenset[str] = frozenset()
    dangerous: bool = False


ACTIONS: Mapping[str, Action] = {
    "cancel": Action(
        "Cancel",
        "The reset stops before its next chunk. Keys that it has not reached stay as they are and count as dirty until "
        "the job is requeued.",
        "Cancel the job",
        True,
        frozenset({"PENDING", "PROCESSING"}),
        dangerous=True,
    ),
    "requeue": Action(
        "Requeue",
        "The corrections that the job left held are released, under a new correction from the earliest of their dates.",
        "Requeue the job",
        True,
        frozenset({"FAILED", "CANCELLED"}),
    ),
    "prioritise": Action(
        "Prioritise",
        "A higher priority goes first, in the reset and then in the valuation. Usual is 0.",
        "Set the priority",
        True,
        frozenset({"PENDING", "PROCESSING"}),
    ),
    "pause": Action("Pause resets", "No chunk begins from now on, on any worker.", "Pause", False, dangerous=True),
    "resume": Action("Resume resets", "Resets go on at the rate that is set.", "Resume", False),
    "throttle": Action(
        "Set the reset rate",
        "Keys per second of all workers together, in force within a second.",
        "Set the rate",
        False,
    ),
}


class Actions:
    """Confirm, do, and list what was done."""

    def __init__(self, app: App) -> None:
        self._app = app

    def add_routes(self, application: web.Application) -> None:
        """Mount the pages."""
        application.router.add_get("/actions", self.show_all)
        application.router.add_get("/actions/{name}", self.confirm)
        application.router.add_post("/actions/{name}", self.act)

    async def show_all(self, request: web.Request) -> web.StreamResponse:
        """The audit trail."""
        async with (await self._app.pool()).acquire() as connection:
            found = await actions.latest(connection)
        return render.page(request, "actions.html", actions=found)

    async def confirm(self, request: web.Request) -> web.StreamResponse:
        """What will happen, and to what."""
        name, action = _action(request)
        values = request.query
        async with (await self._app.pool()).acquire() as connection:
            jobs = await self._jobs(connection, action, values) if action.on_jobs else []
            limit = await operations.limit_state(connection)
        return render.page(
            request,
            "confirm.html",
            name=name,
            action=action,
            jobs=jobs[:_SHOWN],
            count=len(jobs),
            single=bool(values.get("job_id")),
            fields={field: values[field] for field in values if field in _FIELDS},
            back=_back(values),
            rate=limit.rows_per_second if limit else self._app.settings.reset_rows_per_second,
            rates=RESET_RATE,
            priorities=PRIORITY,
        )

    async def act(self, request: web.Request) -> web.StreamResponse:
        """Do it, job by job, each a transaction with its audit row; what cannot be done is shown."""
        name, action = _action(request)
        actor, form = access.operator(request), await parameters.form(request)
        async with (await self._app.pool()).acquire() as connection:
            if action.on_jobs:
                jobs = await self._jobs(connection, action, form)
                refused = await self._each(connection, name, actor, jobs, form)
            else:
                jobs, refused = [], await self._limit(connection, name, actor, form)
        self._app.outbox_written()
        if refused:
            done = len(jobs) - len(refused)
            raise Problem("refused", f"{done} done; " + "; ".join(refused[:_SHOWN]))
        raise web.HTTPSeeOther(_back(form))

    async def _jobs(self, connection: Connection, action: Action, values: Any) -> list[dict[str, Any]]:
        """The one that is named, or all of corrections that match the filter."""
        if values.get("job_id"):
            job_id = parameters.number(values, "job_id")
            assert job_id is not None
            try:
                return [await operations.show_job(connection, job_id)]
            except operations.Refused as error:
                raise Problem("not-found", str(error)) from None
        wanted = parameters.corrections_filter(values)
        rows = await ledger.corrections(connection, wanted, None, _MOST_AT_ONCE)
        jobs = {row.job_id: row for row in rows if row.job_id and row.job_status in action.job_statuses}
        return [
            {"job_id": job_id, "security_id": row.security_id, "status": row.job_status}
            for job_id, row in sorted(jobs.items())
        ]

    async def _each(
        self, connection: Connection, name: str, actor: str, jobs: list[dict[str, Any]], form: Any
    ) -> list[str]:
        do: Callable[[int], Awaitable[Any]]
        match name:
            case "cancel":
                do = lambda job_id: operations.cancel_job(connection, actor, job_id)  # noqa: E731
            case "requeue":
                do = lambda job_id: operations.requeue_job(connection, actor, job_id)  # noqa: E731
            case _:
                priority = _priority(form)
                do = lambda job_id: operations.prioritise_job(connection, actor, job_id, priority)  # noqa: E731
        refused = []
        for job in jobs:
            try:
                await do(job["job_id"])
            except operations.Refused as error:
                refused.append(str(error))
        return refused

    async def _limit(self, connection: Connection, name: str, actor: str, form: Any) -> list[str]:
        first = self._app.settings.reset_rows_per_second
        try:
            match name:
                case "pause":
                    await operations.pause(connection, actor, first)
                case "resume":
                    await operations.resume(connection, actor, first)
                case _:
                    await operations.throttle(connection, actor, _rate(form))
        except operations.Refused as error:
            return [str(error)]
        return []


_FIELDS = frozenset({"job_id", "status", "security_id", "older_than_seconds", "back"})


def _action(request: web.Request) -> tuple[str, Action]:
    name = request.match_info["name"]
    if name not in ACTIONS:
        raise Problem("not-found", f"there is no action {name}")
    return name, ACTIONS[name]


def _back(values: Any) -> str:
    return local_path(values.get("back") or "/corrections")


def _priority(form: Any) -> int:
    return parameters.checked("priority", lambda: PRIORITY.parse(form.get("priority", "")))


def _rate(form: Any) -> float:
    return parameters.checked("rows_per_second", lambda: RESET_RATE.parse(form.get("rows_per_second", "")))
