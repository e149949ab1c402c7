"""`make chaos SEED=… MINUTES=…`, or a table of seeds: `python -m tests.chaos --seeds 1-20 --table FILE.json`."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import click

from tests.chaos.faults import FAULTS
from tests.chaos.report import Report, Table, markdown
from tests.chaos.run import run, standard

_LONGEST_SECONDS = 1_500.0  # of one run, whatever happens


def _seeds(context: click.Context, option: click.Parameter, text: str | None) -> list[int]:
    found: list[int] = []
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        try:
            found += range(int(first), int(last or first) + 1) if first else []
        except ValueError:
            raise click.BadParameter("expected seeds like 1-20 or 3,5,8-10") from None
    return found


def _names(context: click.Context, option: click.Parameter, text: str | None) -> list[str]:
    found: list[str] = []
    for part in text.split(",") if text else []:
        name, _, times = part.strip().partition("*")
        if name not in FAULTS or not (times or "1").isdigit():
            raise click.BadParameter(f"expected faults like lose_worker*5 of: {', '.join(FAULTS)}")
        found += [name] * int(times or 1)
    return found


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first run; the next has the next.")
@click.option("--minutes", type=float, default=5, show_default=True, help="Start no run after so many.")
@click.option("--seeds", callback=_seeds, help="These seeds instead, like 1-20 or 3,5,8-10, however long it takes.")
@click.option("--table", type=click.Path(dir_okay=False, path_type=Path), help="Keep reports in this JSON file, and as "
              "Markdown beside it. Seeds that it has already are not run again.")  # fmt: skip
@click.option("--records", type=int, default=100_000, show_default=True, help="In each input topic.")
@click.option("--faults", type=int, default=14, show_default=True, help="In each run.")
@click.option("--script", callback=_names, help="These faults instead of the seed's, like lose_worker*5,fill_disk, "
              "each when the one before has been recovered from.")  # fmt: skip
@click.option("--brokers", type=click.Choice(["1", "3"]), help="Default: every fourth seed has three.")
def main(
    seed: int,
    minutes: float,
    seeds: list[int],
    table: Path | None,
    records: int,
    faults: int,
    script: list[str],
    brokers: str | None,
) -> None:
    """Break a whole topology from seeds, and judge it. Exits with 1 when a promise was broken.

    The same seed gives the same load and the same choice of faults (not the same interleaving: processes are real).
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything started is ended
    known = Table(table) if table else None
    end = time.monotonic() + 60 * minutes
    reports: list[Report] = []
    queue = iter(seeds or range(seed, sys.maxsize))
    for number in queue:
        if known and number in known:
            click.echo(f"seed {number}: in the table already")
            continue
        plan = replace(standard(number), per_topic=records, faults=faults)
        plan = replace(plan, script=script, at_once=0.0) if script else plan
        report = _bounded(number, replace(plan, brokers=int(brokers)) if brokers else plan)
        reports.append(report)
        click.echo("\n".join([report.line(), *report.wrong]))
        if known:
            known.add(report)
        if not seeds and time.monotonic() > end:
            break
    click.echo("\n" + markdown(reports))
    sys.exit(1 if any(report.wrong for report in reports) or (known and known.wrong) else 0)


def _bounded(seed, plan) -> Report:
    async def within() -> Report:
        async with asyncio.timeout(_LONGEST_SECONDS):
            return await run(seed, plan, click.echo)

    try:
        return asyncio.run(within())
    except TimeoutError:
        return Report(seed, plan.brokers, wrong=[f"not over after {_LONGEST_SECONDS:.0f} s"])


main()
