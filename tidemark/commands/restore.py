"""`tidemark after-restore`: what must happen between a restore of the database and the start of the workers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import click
from aiokafka.errors import KafkaError

from streams.restore import after_restore as move
from streams.settings import load
from streams.topics import TopicError
from tidemark.commands import output


@click.command("after-restore")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def after_restore(as_json: bool) -> None:
    """After the database was restored from a backup, before workers start: move its sequences past anything published.

    Consumers drop events whose id they have passed, and the trigger table drops triggers whose seq it has covered; the
    restored database would use such numbers again. Safe to repeat.
    """
    settings = load()
    try:
        published, now = asyncio.run(move(settings))
    except KafkaError as error:
        raise TopicError(f"cannot read what was published at {settings.bootstrap_servers}: {error}") from error
    if as_json:
        output.echo_json(json.dumps({"published": asdict(published), "now": asdict(now)}))
        return
    output.echo(f"event_id: up to {published.event_id} was published; the next ones are above {now.event_id}")
    output.echo(f"correction seq: up to {published.seq} was published; the next ones are above {now.seq}")


COMMANDS = [after_restore]
