"""`tidemark after-restore`: a dry run of what workers do after a restore or a promotion of the database."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import click

from streams.confirm import Findings, look
from streams.settings import load
from tidemark.commands import output
from tidemark.commands.confirmed import reading_what_was_published


@click.command("after-restore")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def after_restore(as_json: bool) -> None:
    """Say what the database has lost that was published, if anything. Nothing is changed.

    Workers find it out by themselves after each start of Postgres: they let no write in before. What was published and
    lost they announce anew, under a new generation.
    """
    settings = load()
    with reading_what_was_published(settings):
        found = asyncio.run(look(settings))
    if as_json:
        output.echo_json(json.dumps(asdict(found)))
        return
    for line in _lines(found):
        output.echo(line)


def _lines(found: Findings) -> list[str]:
    gate = "confirmed: workers write" if found.is_open else "not confirmed yet: no worker writes before it is"
    lines = [f"generation {found.generation}; this server is {gate}"]
    if not found.has_lost:
        return [*lines, "the database has lost nothing that was published"]
    lines.append(f"the database knows round {found.round} of the relay; round {found.published_round} was published")
    if not found.reaches_back:
        return [*lines, "the logs no longer reach back to it: every position will be announced anew"]
    return [
        *lines,
        f"to be announced anew: {found.keys:,} positions, and what is not true of the statuses of {found.jobs:,} jobs",
        f"event ids will go on above {found.event_id:,}, correction seqs above {found.seq:,}",
    ]


COMMANDS = [after_restore]
