"""`tidemark audit`: are the books right?"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sinks.ranges import OutOfRange, Real, Whole
from streams.settings import Settings, load
from tidemark.audit import AuditResult, Scope, audit_books, repair
from tidemark.audit.export import SUFFIXES, exporting
from tidemark.commands import output
from tidemark.commands.actor import actor_option
from tidemark.commands.confirmed import once_confirmed
from tidemark.oracle import Difference

_SHOWN = 1_000
_KEYS, _PERCENT = Whole(1, 10**9), Real(1e-6, 100)


class _Sample(click.ParamType):
    name = "N|N%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, bool]:
        text, is_percent = str(value).removesuffix("%"), str(value).endswith("%")
        try:
            return float((_PERCENT if is_percent else _KEYS).parse(text)), is_percent
        except OutOfRange as error:
            self.fail(f"of keys, or a percentage: {error}", param, ctx)


@click.command()
@click.option("--portfolio", metavar="P", help="Only the positions of one portfolio.")
@click.option("--security", metavar="S", help="Only the positions in one security.")
@click.option("--key", nargs=2, metavar="P S", help="Only one position.")
@click.option("--sample", type=_Sample(), help="Only so many positions, or that share of them, drawn at random.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.option(
    "--export",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=lambda _context, _parameter, value: _checked(value),
    metavar="FILE",
    help="Write every difference to FILE: .csv or .jsonl.",
)
@click.option("--repair", "repairing", is_flag=True, help="Queue what differs to be put right through the normal path.")
@actor_option
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=lambda: min(4, os.cpu_count() or 1),
    show_default="the processors, at most 4",
    help="Work in so many processes.",
)
def audit(
    *,
    portfolio: str | None,
    security: str | None,
    key: tuple[str, str] | None,
    sample: tuple[float, bool] | None,
    as_json: bool,
    export: Path | None,
    repairing: bool,
    actor: str,
    processes: int,
) -> None:
    """Recompute the books independently of the engine and list every difference.

    Reads one moment of the database: it may run while records flow, takes no lock and does not need Kafka. Keys that
    visibly wait for a correction or a valuation are counted separately; of those, history and earlier dates are
    compared.

    Exits 0 when all that was compared agrees, 1 when something differs, 2 on wrong usage.
    """
    scope = _scope(portfolio, security, key, sample)
    settings = load()
    planner = repair.Planner()
    try:
        with exporting(export) if export else nullcontext(lambda difference: None) as write:

            def take(difference: Difference) -> None:
                planner.add(difference)
                write(difference)

            result = asyncio.run(_run(settings, scope, processes, take))
    except OSError as error:
        raise click.ClickException(str(error)) from error
    if scope != Scope() and not result.keys:
        raise click.ClickException("the books and the transactions have no such position")
    plan = planner.plan()
    if repairing and not result.agrees:
        method = settings.cost_basis_method
        asyncio.run(once_confirmed(settings, lambda: repair.carry_out(settings.dsn, actor, method, plan)))
    if as_json:
        output.echo_json(json.dumps(_as_dict(result), default=str))
    else:
        for line in _lines(result):
            output.echo(line)
    if repairing:
        counts = f"{len(plan.keys):,} positions and {len(plan.securities):,} securities"
        output.echo(f"queued to be put right: {counts}; audit again when the books are right", err=True)
    sys.exit(0 if result.agrees else 1)


def _checked(path: Path | None) -> Path | None:
    if path and path.suffix not in SUFFIXES:
        raise click.BadParameter(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
    return path


def _scope(
    portfolio: str | None, security: str | None, key: tuple[str, str] | None, sample: tuple[float, bool] | None
) -> Scope:
    if sum(each is not None for each in (portfolio, security, key, sample)) > 1:
        raise click.UsageError("--portfolio, --security, --key and --sample exclude each other")
    size, is_percent = sample or (None, False)
    return Scope(
        portfolio_id=portfolio,
        security_id=security,
        key=key,
        sample=int(size) if size and not is_percent else None,
        sample_percent=size if is_percent else None,
    )


async def _run(
    settings: Settings, scope: Scope, processes: int, on_difference: Callable[[Difference], None]
) -> AuditResult:
    columns = (TextColumn("auditing"), BarColumn(), MofNCompleteColumn(), TextColumn("keys"), TimeElapsedColumn())
    with Progress(*columns, console=output.console(stderr=True), transient=True) as bar:
        task = bar.add_task("keys", total=None)
        return await audit_books(
            settings.dsn,
            settings.cost_basis_method,
            lambda done, total: bar.update(task, completed=done, total=total),
            scope=scope,
            processes=processes,
            on_difference=on_difference,
        )


def _as_dict(result: AuditResult) -> dict[str, object]:
    waiting = [{"portfolio_id": portfolio, "security_id": security} for portfolio, security in result.waiting]
    return {"agrees": result.agrees, **asdict(result), "waiting": waiting}


def _lines(result: AuditResult) -> list[str]:
    lines = [str(difference) for difference in result.differences[:_SHOWN]]
    if (more := result.difference_count - len(lines)) > 0:
        lines.append(f"… and {more:,} more: --export FILE writes them all")
    if result.waiting_count:
        waiting = f"{result.waiting_count:,} keys wait for a correction or a valuation"
        lines.append(f"{waiting}: their history and the dates before are compared")
    what = f"{result.snapshots:,} snapshots and {result.history_rows:,} history rows of {result.keys:,} keys"
    if result.agrees:
        lines.append(f"{what} agree with a recomputation ({result.method}, up to {result.latest or 'no closed date'})")
    else:
        lines.append(f"{result.difference_count:,} differences in {what}")
    return lines


COMMANDS = [audit]
