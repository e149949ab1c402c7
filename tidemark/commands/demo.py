"""`tidemark demo`: the whole of Tidemark in a minute, on a stack of its own."""

from __future__ import annotations

import asyncio
import shutil
import sys

import click
from pydantic import SecretStr

from deploy.local import detached, state
from sinks.ranges import Whole
from streams.settings import Settings, load_named
from tidemark.commands import output
from tidemark.commands.numbers import Number
from tidemark.demo import DemoError, make_plan, play

_SEEDS = Whole(0, 2**63 - 1)


@click.command()
@click.option("--portfolios", type=click.IntRange(2, 20_000), default=200, show_default=True)
@click.option("--dates", type=click.IntRange(20, 250), default=65, show_default=True, help="Business dates to load.")
@click.option("--seed", type=Number(_SEEDS), default=2018, show_default=True, help="Of the generated portfolios.")
@click.option("--keep", is_flag=True, help="Leave the stack up, with its console, when the demo is over.")
def demo(portfolios: int, dates: int, seed: int, keep: bool) -> None:
    """Correct a late price and a back-dated trade before your eyes, and prove the books.

    Real closes of 2018, generated portfolios, a stack of its own in DATA_DIR/demo, begun anew each time.
    """
    named = load_named()
    folder = named.data_dir.absolute() / "demo"
    console = output.console(width=None if sys.stdout.isatty() else 118)
    detached.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)
    plan = make_plan(seed, portfolios, dates)
    with console.status("Starting Kafka, Postgres and the workers") as progress:
        own = {"TIDEMARK_BROKER_URL": "", "TIDEMARK_DATABASE_URL": "", "TIDEMARK_TOPIC_PREFIX": ""}
        found = detached.start(folder, own, lambda step: progress.update(output.text(f"Starting the stack · {step}")))
    try:
        agrees = asyncio.run(play(_on(named, found), plan, console))
    except DemoError as error:
        raise click.ClickException(str(error)) from None
    finally:
        if not keep:
            detached.stop(folder)
    if keep:
        console.print(f"The stack stays up: {found.web_url}")
        console.print(f"Stop it with: TIDEMARK_DATA_DIR={folder} tidemark down", soft_wrap=True)
    if not agrees:
        sys.exit(1)


def _on(named: Settings, found: state.StackState) -> Settings:
    database_url = SecretStr(found.database_url) if found.database_url else None
    update = {"broker_url": found.broker_url, "database_url": database_url, "topic_prefix": ""}
    return named.model_copy(update=update)


COMMANDS = [demo]
