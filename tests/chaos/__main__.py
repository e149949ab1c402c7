"""`make chaos SEED=… MINUTES=…`: run after run, each from a seed of its own, until the time is over."""

from __future__ import annotations

import asyncio
import sys
import time

import click

from tests.chaos.run import run


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first run; the next has the next.")
@click.option("--minutes", type=float, default=5, show_default=True, help="Start no run after so many.")
@click.option("--seconds", type=float, default=45, show_default=True, help="Of faults in each run.")
@click.option("--records", type=int, default=6_000, show_default=True, help="In each run.")
def main(seed: int, minutes: float, seconds: float, records: int) -> None:
    """Break a whole topology from seeds, and judge it. Exits with 1 when a promise was broken."""
    end = time.monotonic() + 60 * minutes
    lines, wrong = [], 0
    while True:
        report = asyncio.run(run(seed, seconds, records, click.echo))
        lines.append(report.line())
        wrong += bool(report.wrong)
        click.echo("\n".join([report.line(), *report.wrong]))
        seed += 1
        if time.monotonic() > end:
            break
    click.echo("\n" + "\n".join(lines))
    sys.exit(1 if wrong else 0)


main()
