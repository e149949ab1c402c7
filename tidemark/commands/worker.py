"""`tidemark worker` and `tidemark topics`."""

from __future__ import annotations

import asyncio
import json

import click

from streams import permissions
from streams import topics as kafka_topics
from streams import worker as faust_worker
from streams.settings import ROLES, load, load_named
from tidemark.commands import output


@click.command()
@click.argument("role", type=click.Choice(ROLES))
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
        output.echo_json(json.dumps(found, indent=2))
        return
    for name, what in found.items():
        output.echo(f"{what:<8} {name}")


@click.command()
@click.option("--principal", default="User:tidemark-{role}", show_default=True, help="Who the role is to the broker.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def acls(principal: str, as_json: bool) -> None:
    """Print the least that each role may do in Kafka.

    As arguments of Kafka's own tool: `tidemark acls | xargs -L1 kafka-acls.sh --bootstrap-server …`. The role `topics`
    is who runs `tidemark topics`. Nothing is asked of the broker.
    """
    settings = load_named()
    needed = {role: permissions.needed(settings, role) for role in ROLES}
    needed["topics"] = permissions.needed_to_create(settings)
    rows = [
        {"role": role, "principal": principal.replace("{role}", role), **each._asdict()}
        for role, found in needed.items()
        for each in found
    ]
    if as_json:
        output.echo_json(json.dumps(rows, indent=2))
        return
    for row in rows:
        who, operation = row["principal"], row["operation"]
        output.echo(f"--add --allow-principal {who} --operation {operation} --{row['resource']} {row['name']}")


COMMANDS = [worker, topics, acls]
