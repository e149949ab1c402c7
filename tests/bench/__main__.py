"""`make bench`: all benchmarks, or those named; prints a table and writes JSON."""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from streams import garbage
from tests import bench as package
from tests.bench.harness import Bench, Result, as_json, open_bench
from tests.bench.provenance import provenance

NAMES = sorted(
    module.name.removeprefix("bench_")
    for module in pkgutil.iter_modules(package.__path__)
    if module.name.startswith("bench_")
)
_FULL_SIZE_ONLY = {"bank_day", "console", "scale"}
"""Without a baseline, or mostly the starts of workers: a small load says little, so a quick look needs them named."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES) if NAMES else str)
@click.option("--quick", is_flag=True, help="Smaller loads and fewer rounds, for a rough look.")
@click.option("--rounds", type=click.IntRange(1, 50), help="Default: 5, quick: 1.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(names: tuple[str, ...], quick: bool, rounds: int | None, file: Path | None) -> None:
    """Measure, each path beside its baseline in the same run. Default: all; quick: but bank_day, console and scale."""
    console = Console(stderr=True)
    begun = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **provenance()}

    def keep(bench: Bench) -> None:
        if file:
            file.write_text(json.dumps(as_json(bench, begun), indent=1) + "\n")

    bench = asyncio.run(_run(names or _default(quick), quick, rounds or (1 if quick else 5), console, keep))
    Console(width=140).print(_table(bench.results))
    if quick:
        console.print("Small loads, few rounds: a rough look, no figures to keep.")


def _default(quick: bool) -> tuple[str, ...]:
    return tuple(name for name in NAMES if not (quick and name in _FULL_SIZE_ONLY))


async def _run(
    names: tuple[str, ...], quick: bool, rounds: int, console: Console, keep: Callable[[Bench], None]
) -> Bench:
    """keep: told after each benchmark, so that one that fails takes nothing with it."""
    async with open_bench(quick=quick, rounds=rounds, say=lambda step: console.print(step, highlight=False)) as bench:
        for number, name in enumerate(names, 1):
            bench.say(f"{name}: benchmark {number} of {len(names)}")
            module = importlib.import_module(f"tests.bench.bench_{name}")
            garbage.look_less_often()  # as in a worker: what runs in this process, baselines too, is to have no less
            async with bench.running(name):
                await module.run(bench)
            keep(bench)
        return bench


def _table(results: list[Result]) -> Table:
    table = Table("path", "median", "lowest - highest", "unit", "baseline", "ratio", "wanted", "note")
    for result in results:
        table.add_row(
            result.name,
            _figure(result.median),
            f"{_figure(min(result.rounds))} - {_figure(max(result.rounds))}",
            result.unit,
            result.baseline or "-",
            "-" if result.ratio is None else f"{result.ratio:.2f}",
            "-" if result.wanted is None else f"{result.wanted:g}",
            "; ".join(part for part in ("less is better" if result.less else "", result.note) if part),
        )
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


if __name__ == "__main__":
    main()
