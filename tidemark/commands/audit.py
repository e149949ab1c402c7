"""`tidemark audit`: are the books right?"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sinks.database import DatabaseError
from streams.settings import SettingsError, load
from tidemark.audit import AuditResult, audit_books


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def audit(*, as_json: bool) -> None:
    """Recompute the books independently of the engine and list every difference.

    Exits 0 when they agree and 1 when not. Keys that wait for a correction or a valuation are counted
    separately.
    """
    try:
        result = asyncio.run(_run())
    except (SettingsError, DatabaseError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(_as_dict(result), default=str) if as_json else "\n".join(_lines(result)))
    sys.exit(0 if result.agrees else 1)


async def _run() -> AuditResult:
    settings = load()
    columns = (TextColumn("auditing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("securities", total=None)
        return await audit_books(
            settings.dsn,
            settings.cost_basis_method,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def _as_dict(result: AuditResult) -> dict[str, object]:
    waiting = [{"portfolio_id": portfolio, "security_id": security} for portfolio, security in result.waiting]
    return {"agrees": result.agrees, **asdict(result), "waiting": waiting}


def _lines(result: AuditResult) -> list[str]:
    lines = list(result.differences)
    if result.waiting:
        waiting = f"{len(result.waiting):,} keys wait for a correction or a valuation"
        lines.append(f"{waiting}: only their history is compared")
    what = f"{result.snapshots:,} snapshots and {result.history_rows:,} history rows of {result.keys:,} keys"
    if result.agrees:
        lines.append(f"{what} agree with a recomputation ({result.method}, up to {result.latest or 'no closed date'})")
    else:
        lines.append(f"{len(result.differences):,} differences in {what}")
    return lines


COMMANDS = [audit]
