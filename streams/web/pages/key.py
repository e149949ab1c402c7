"""`/portfolios/P/securities/S`: one key: epoch, watermark, daily values, history by epoch with what each changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from aiohttp import web
from yarl import URL

from sinks import ledger, monitor
from streams.app import App
from streams.web import parameters, render
from streams.web.charts import value_chart
from streams.web.links import segment
from streams.web.problems import Problem

_ROWS = 2_000
_LATEST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Epoch:
    """One version of the key's history. rows: as they were when it was live. change: against the epoch before."""

    number: int
    begun_at: datetime
    live: bool
    rows: list[dict[str, Any]]
    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    quantity_change: Decimal | None
    cost_change: Decimal | None
    realized_change: Decimal | None


class Key:
    """The page, and the look-up that leads to it."""

    def __init__(self, app: App) -> None:
        self._app = app

    def add_routes(self, application: web.Application) -> None:
        """Mount both."""
        application.router.add_get("/keys", self.find)
        application.router.add_get("/portfolios/{portfolio_id:[^/]+}/securities/{security_id:[^/]+}", self.show)

    async def find(self, request: web.Request) -> web.StreamResponse:
        """A form; with both ids given, straight to the page."""
        portfolio, security = request.query.get("portfolio_id", ""), request.query.get("security_id", "")
        if portfolio and security:
            raise web.HTTPSeeOther(
                URL(f"/portfolios/{segment(portfolio)}/securities/{segment(security)}", encoded=True)
            )
        return render.page(request, "keys.html", portfolio=portfolio, security=security)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Everything about one key."""
        portfolio, security = parameters.segment(request, "portfolio_id"), parameters.segment(request, "security_id")
        async with (await self._app.pool()).acquire() as connection:
            state = await monitor.read_key(connection, portfolio, security, limit=1)
            if state is None:
                raise Problem("not-found", f"portfolio {portfolio} has never held {security}")
            rows = await ledger.epochs(connection, portfolio, security, _ROWS)
            values = await ledger.daily_values(connection, portfolio, security)
        chart = value_chart(
            [
                (
                    row["valuation_date"],
                    None if row["market_value"] is None else float(row["market_value"]),
                    float(row["cost_basis"]),
                    row["provisional"],
                )
                for row in values
            ]
        )
        return render.page(
            request,
            "key.html",
            state=state,
            epochs=by_epoch(rows),
            truncated=len(rows) == _ROWS,
            chart=chart,
            values=values[-_LATEST_SHOWN:][::-1],
            provisional=sum(row["provisional"] for row in values),
            since=min((row["provisional_since_seq"] for row in values if row["provisional_since_seq"]), default=None),
        )


def by_epoch(rows: Sequence[dict[str, Any]]) -> list[Epoch]:
    """History rows of all epochs to the versions of the history, latest first.

    A row belongs to every epoch from the one that wrote it to the one before it was superseded.
    """
    begun: dict[int, datetime] = {}
    for row in rows:
        for number, at in ((row["epoch"], row["recorded_at"]), (row["superseded_epoch"], row["superseded_at"])):
            if number is not None:
                begun[number] = min(at, begun.get(number, at))
    numbers = sorted(begun, reverse=True)
    versions = {
        number: sorted(
            (
                row
                for row in rows
                if row["epoch"] <= number and (row["superseded_epoch"] is None or row["superseded_epoch"] > number)
            ),
            key=lambda row: row["sequence"],
        )
        for number in numbers
    }
    found = []
    for place, number in enumerate(numbers):
        live = versions[number]
        before = versions[numbers[place + 1]] if place + 1 < len(numbers) else None
        known = {row["transaction_id"] for row in before or []}
        now = {row["transaction_id"] for row in live}
        found.append(
            Epoch(
                number=number,
                begun_at=begun[number],
                live=place == 0,
                rows=live,
                added=[row for row in live if row["transaction_id"] not in known] if before is not None else [],
                removed=[row for row in before or [] if row["transaction_id"] not in now],
                quantity_change=_change(live, before, "quantity"),
                cost_change=_change(live, before, "cost_basis"),
                realized_change=_change(live, before, "realized_gain_loss"),
            )
        )
    return found


def _change(live: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None, column: str) -> Decimal | None:
    if before is None:
        return None
    zero = Decimal(0)
    last: Decimal = live[-1][column] if live else zero
    earlier: Decimal = before[-1][column] if before else zero
    return last - earlier
