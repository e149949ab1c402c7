"""`tidemark worker` and `tidemark topics`."""

from __future__ import annotations

import asyncio
import json

import click

from streams import topics as kafka_topics
from streams import worker as faust_worker
from streams.settings import load


@click.command()
@click.argument("role", type=click.Choice(faust_worker.ROLES))
def worker(role: str) -> None:
    """Run one more worker of a role in this process, until SIGTERM or Ctrl-C.

    Each worker needs a DATA_DIR of its own.
    """
    faust_worker.run(role, load())


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def topics(as_json: bool) -> None:
    """Create the topics that are missing and check the others."""
    found = asyncio.run(kafka_topics.ensure_topics(load()))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, what in found.items():
        click.echo(f"{what:<8} {name}")


COMMANDS = [worker, topics]
