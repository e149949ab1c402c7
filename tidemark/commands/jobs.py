"""`tidemark jobs`, `pause`, `resume`, `throttle`, `impact`, `reprocess`: what operators do with resets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import date, datetime
from typing import Any, TypeVar

import click
from rich.table import Table

from sinks import operations, progress
from sinks.database import Connection, open_connection
from sinks.operations import LimitState
from sinks.ranges import ID, PRIORITY, RESET_RATE
from streams.settings import load
from tidemark.commands import output
from tidemark.commands.actor import actor_option
from tidemark.commands.confirmed import once_confirmed
from tidemark.commands.numbers import Number

T = TypeVar("T")

STATUSES = ("PENDING", "PROCESSING", "COMPLETE", "FAILED", "CANCELLED")


class _Day(click.ParamType):
    name = "date"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        if isinstance(value, date):
            return value
        try:
            return date.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not an ISO date (YYYY-MM-DD)", param, ctx)


_json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")


@click.group()
def jobs() -> None:
    """List reset jobs, and cancel, requeue or prioritise them."""


@jobs.command("list")
@click.option("--status", "statuses", multiple=True, type=click.Choice(STATUSES), help="Only these; may be repeated.")
@click.option("--security", "security_id", help="Only this security's.")
@click.option("--before", type=Number(ID), help="Only jobs with a smaller id: the next page.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@_json_option
def list_(statuses: tuple[str, ...], security_id: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    found = _ask(
        lambda c: operations.list_jobs(c, statuses=statuses, security_id=security_id, before=before, limit=limit)
    )
    if as_json:
        _print_json(found)
        return
    if not found:
        output.echo("no jobs")
        return
    columns = ("job_id", "security_id", "earliest_impacted_date", "status", "priority", "keys_done", "keys_total",
               "created_at", "finished_at", "failure_reason")  # fmt: skip
    table = Table(*columns, box=None)
    for job in found:
        output.add_row(table, (_text(job[name]) for name in columns))
    output.console(width=None if output.console().is_terminal else 240).print(table)


@jobs.command()
@click.argument("job_id", type=Number(ID))
@_json_option
def show(job_id: int, as_json: bool) -> None:
    """Show a job, the corrections it covers, and how far they are."""

    async def read(connection: Connection) -> dict[str, Any]:
        job = await operations.show_job(connection, job_id)
        far = await progress.corrections_progress(connection, [each["seq"] for each in job["corrections"]])
        return {**job, "corrections": [asdict(each) for each in far]}

    _print_job(_ask(read), as_json)


@jobs.command()
@click.argument("job_id", type=Number(ID))
@actor_option
@_json_option
def cancel(job_id: int, actor: str, as_json: bool) -> None:
    """Stop a job before its next chunk.

    Its corrections are held: keys not reset yet stay as they are, visibly stale in dirty_keys, until it is requeued.
    """
    _print_job(_ask(lambda c: operations.cancel_job(c, actor, job_id)), as_json)


@jobs.command()
@click.argument("job_id", type=Number(ID))
@actor_option
@_json_option
def requeue(job_id: int, actor: str, as_json: bool) -> None:
    """Correct anew what a FAILED or CANCELLED job has left."""
    _print_job(_ask(lambda c: operations.requeue_job(c, actor, job_id)), as_json)


@jobs.command(context_settings={"ignore_unknown_options": True})
@click.argument("job_id", type=Number(ID))
@click.argument("priority", type=Number(PRIORITY))
@actor_option
@_json_option
def prioritise(job_id: int, priority: int, actor: str, as_json: bool) -> None:
    """Let a job go before those of lower PRIORITY (0 at first), in the reset and in the valuation."""
    _print_job(_ask(lambda c: operations.prioritise_job(c, actor, job_id, priority)), as_json)


@click.command()
@actor_option
@_json_option
def pause(actor: str, as_json: bool) -> None:
    """Pause all resets; live traffic and valuations go on."""
    _print_limit(_ask(lambda c: operations.pause(c, actor, load().reset_rows_per_second)), as_json)


@click.command()
@actor_option
@_json_option
def resume(actor: str, as_json: bool) -> None:
    """Let resets go on."""
    _print_limit(_ask(lambda c: operations.resume(c, actor, load().reset_rows_per_second)), as_json)


@click.command()
@click.argument("rows_per_second", type=Number(RESET_RATE))
@actor_option
@_json_option
def throttle(rows_per_second: float, actor: str, as_json: bool) -> None:
    """Set the rate of resets, keys per second over all workers."""
    _print_limit(_ask(lambda c: operations.throttle(c, actor, rows_per_second)), as_json)


@click.command()
@click.argument("security")
@click.argument("from_date", metavar="DATE", type=_Day())
@_json_option
def impact(security: str, from_date: date, as_json: bool) -> None:
    """Say what a correction of SECURITY from DATE on would touch, and how long the reset would take now."""
    found = _ask(lambda c: operations.impact(c, security, from_date))
    if as_json:
        _print_json(asdict(found))
        return
    time = "at a rate not known yet" if found.reset_seconds is None else f"in about {found.reset_seconds:,.1f} s"
    output.echo(f"{found.keys:,} keys to reset {time}; {found.snapshots:,} snapshots to value again")


@click.command()
@click.option("--security", help="All holders of it.")
@click.option("--portfolio", help="All its keys.")
@click.option("--key", nargs=2, metavar="PORTFOLIO SECURITY", help="One key.")
@click.argument("from_date", type=_Day())
@actor_option
@_json_option
def reprocess(
    security: str | None,
    portfolio: str | None,
    key: tuple[str, str] | None,
    from_date: date,
    actor: str,
    as_json: bool,
) -> None:
    """Value again from FROM_DATE on: a security, a portfolio, or one key."""
    if sum(each is not None for each in (security, portfolio, key)) != 1:
        raise click.UsageError("name exactly one of --security, --portfolio, --key")
    if key:
        portfolio, security = key
    found = _ask(lambda c: operations.reprocess(c, actor, from_date, security_id=security, portfolio_id=portfolio))
    if as_json:
        _print_json({"seqs": found.seqs, "keys": found.keys})
        return
    what = "a job will reset its holders" if found.keys is None else f"{found.keys:,} keys reset"
    seqs = sorted(found.seqs.values())
    output.echo(f"correction {seqs[0]}{f' to {seqs[-1]}' if len(seqs) > 1 else ''}: {what}")


COMMANDS = [jobs, pause, resume, throttle, impact, reprocess]


def _ask(question: Callable[[Connection], Awaitable[T]]) -> T:
    settings = load()

    async def run() -> T:
        async with open_connection(settings.dsn) as connection:
            return await question(connection)

    return asyncio.run(once_confirmed(settings, run))


def _print_job(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(job)
        return
    covered = job.pop("corrections")
    for name, value in job.items():
        if value is not None:
            output.echo(f"{name:<24}{_text(value)}")
    for each in covered:
        parts = [f"{name}={_text(value)}" for name, value in each.items() if value is not None]
        output.echo("correction  " + "  ".join(parts))


def _print_limit(state: LimitState, as_json: bool) -> None:
    if as_json:
        _print_json({**asdict(state), "in_force": state.in_force})
        return
    output.echo("paused" if state.paused else f"{state.in_force:,.0f} keys per second")


def _print_json(value: Any) -> None:
    output.echo_json(json.dumps(value, indent=2, default=_text))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)
