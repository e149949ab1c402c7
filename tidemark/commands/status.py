"""`tidemark status`: the state of the books, from wherever their database can be reached, and who works on them."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import click

from deploy.local import state
from deploy.local.state import StackState
from sinks import roster, summary
from sinks.database import DatabaseError, open_connection
from sinks.summary import Summary
from streams.lag import LagUnknown, PartitionLag, read_lag
from streams.settings import ROLES, Settings, load, load_named
from tidemark.commands import output
from tidemark.commands.stack import print_addresses

_LAG_SECONDS = 10.0  # a broker that is away must not keep the rest from being told


@dataclass(frozen=True, slots=True)
class _Installation:
    """Lags None: the broker does not answer."""

    books: Summary
    workers: list[roster.Worker]
    lags: list[PartitionLag] | None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(as_json: bool) -> None:
    """Show the state of the books, and the workers.

    Needs the settings of database and broker, or the local stack of TIDEMARK_DATA_DIR, whose addresses are shown too.
    Exits with 1 unless the local stack, or a worker of each role, is ready.
    """
    named = load_named()
    found = state.read(named.data_dir)
    stack = found if found and found.alive else None
    installation, problem = None, None
    if stack or named.database_url:
        try:
            installation = asyncio.run(_read(named if named.database_url else load()))
        except DatabaseError as error:
            problem = str(error)
    if problem and not stack:
        raise click.ClickException(problem)
    if as_json:
        output.echo_json(json.dumps(_as_dict(named, stack, installation), indent=2, default=str))
    elif stack is None and installation is None:
        raise click.ClickException(f"no local stack runs in {named.data_dir}: start one with `tidemark up`")
    else:
        _print(stack, installation, problem)
    if not _ready(stack, installation):
        sys.exit(1)


async def _read(settings: Settings) -> _Installation:
    async with open_connection(settings.dsn) as connection:
        books, workers = await summary.read(connection), await roster.read(connection)
        try:
            async with asyncio.timeout(_LAG_SECONDS):
                lags = await read_lag(settings, connection)
        except (LagUnknown, TimeoutError):
            lags = None
    return _Installation(books, [each for each in workers if not each.gone], lags)


def _ready(stack: StackState | None, installation: _Installation | None) -> bool:
    if stack:
        return stack.ready
    ready = {each.role for each in installation.workers if each.missing is None} if installation else set()
    return ready >= set(ROLES)


def _as_dict(named: Settings, stack: StackState | None, installation: _Installation | None) -> dict[str, Any]:
    """The stack's addresses where there is one; a database's that is named may hold a password, and is not repeated."""
    workers: list[dict[str, Any]]
    if stack:
        workers = [
            {"role": w.role, "pid": w.pid, "web_url": w.web_url, "ready": w.ready, "restarts": w.restarts}
            for w in stack.workers
        ]
    else:
        workers = [
            {"role": w.role, "pid": w.pid, "web_url": w.web_url, "ready": w.missing is None}
            for w in (installation.workers if installation else [])
        ]
    return {
        "broker_url": stack.broker_url if stack else named.broker_url,
        "database_url": stack.database_url if stack else None,
        "web_url": stack.web_url if stack else None,
        "ready": _ready(stack, installation),
        "workers": workers,
        "books": _books(installation) if installation else None,
    }


def _books(installation: _Installation) -> dict[str, Any]:
    lags = installation.lags
    return {
        "right": installation.books.right,
        **asdict(installation.books),
        "lag_records": None if lags is None else sum(each.lag for each in lags),
        "lag_seconds": None if lags is None else max((each.lag_seconds for each in lags), default=0.0),
    }


def _print(stack: StackState | None, installation: _Installation | None, problem: str | None) -> None:
    if stack:
        print_addresses(stack)
    for name, text in _lines(installation) if installation else [("state", problem or "not known")]:
        output.echo(f"{name:<12}{text}")
    if stack:
        shown = [(w.role, w.pid, w.web_url, "ready" if w.ready else "not ready") for w in stack.workers]
    else:
        shown = [(w.role, w.pid, w.web_url, w.missing or "ready") for w in installation.workers] if installation else []
    for role, pid, url, ready in shown:
        output.echo(f"{role:<12}pid {pid or '-'}  {url}  {ready}")


def _lines(installation: _Installation) -> list[tuple[str, str]]:
    books = installation.books
    latest = books.latest_closed_date
    if latest is None:
        state_ = "no date is closed"
    elif not books.dirty_keys:
        state_ = f"final up to {latest}"
    else:
        what = f"{books.dirty_keys:,} keys provisional, {books.dirty_snapshots:,} snapshots to value at most"
        state_ = f"{latest} is the latest closed date; {what}"
    oldest = (
        f", oldest {books.oldest_correction_seconds:,.0f} s" if books.corrections_open > books.corrections_held else ""
    )
    open_ = f"{books.corrections_open:,} open{oldest}; {books.corrections_held:,} held"
    rate = "not set yet" if books.reset_rate is None else f"{books.reset_rate:,.0f} keys per second"
    return [
        ("state", state_),
        ("corrections", f"{open_}; {books.securities_waiting:,} securities wait for a reset"),
        ("reset rate", "paused" if books.resets_paused else rate),
        ("lag", _lag(installation.lags)),
        ("outbox", f"{books.outbox_pending:,} events wait, {books.outbox_held:,} of them held back"),
        ("audit", _audit(books)),
    ]


def _lag(lags: list[PartitionLag] | None) -> str:
    if lags is None:
        return "the broker does not answer"
    records = sum(each.lag for each in lags)
    return f"{records:,} records, {max(each.lag_seconds for each in lags):,.1f} s" if records else "nothing is behind"


def _audit(books: Summary) -> str:
    age = books.audit_age_seconds
    last = "no full pass yet" if age is None else f"last full pass {age:,.0f} s ago"
    return f"{last}; {books.audit_differences:,} differences in {books.audit_keys:,} keys of the pass under way"


COMMANDS = [status]
