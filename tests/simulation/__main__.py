"""`make simulate SECONDS=60`: look for a run that ends wrong; with --traps, how soon each trap is found unguarded."""

from __future__ import annotations

import sys

import click
import pytest
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.simulation.judge import Search, run_once, search
from tests.simulation.ledger import without_waiting
from tests.simulation.scheduler import Choices
from tests.simulation.traps import TRAPS
from tests.simulation.world import World


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the first run; the next has the next.")
@click.option("--seconds", default=60.0, show_default=True, help="Of CPU time, for each search.")
@click.option("--traps", is_flag=True, help="Take out one guard after another, and see how soon that is found.")
@click.option("--show", is_flag=True, help="Only the run of the seed: its records, and what is wrong.")
def main(seed: int, seconds: float, traps: bool, show: bool) -> None:
    """Explore interleavings; exits with 1 when one breaks a promise, or a trap is not found."""
    with pytest.MonkeyPatch.context() as patch:
        without_waiting(patch)
        if show:
            world, wrong = run_once(World, Choices(seed))
            click.echo("\n".join(f"{topic}: {value}" for topic, value in world.sent))
            click.echo("\n".join(wrong) or "right")
            sys.exit(bool(wrong))
        if traps:
            sys.exit(0 if _find_traps(seed, seconds) else 1)
        found = search(World, seed, sys.maxsize, seconds)
        click.echo(_speed(found))
        if found.wrong:
            click.echo(f"seed {found.seed}; shrunk to {found.shrunk}\n" + "\n".join(found.wrong))
        sys.exit(bool(found.wrong))


def _find_traps(seed: int, seconds: float) -> bool:
    table = Table("trap", "guard taken out", "found by seed", "runs", "CPU seconds", "choices", "shrunk to")
    missed = 0
    for trap in track(TRAPS, console=Console(stderr=True), transient=True):
        with pytest.MonkeyPatch.context() as patch:
            trap.sabotage(patch)
            found = search(trap.make, seed, sys.maxsize, seconds)
        missed += found.seed is None
        figures = (str(found.seed), f"{found.runs:,}", f"{found.seconds:.2f}", len(found.choices), len(found.shrunk))
        table.add_row(trap.name, trap.guard, *map(str, figures))
    Console(width=200).print(table)
    return not missed


def _speed(found: Search) -> str:
    runs, steps = found.runs / found.seconds, found.steps / found.seconds
    return f"{found.runs:,} runs in {found.seconds:.1f} s of CPU: {runs:,.0f} runs and {steps:,.0f} steps a second"


if __name__ == "__main__":
    main()
