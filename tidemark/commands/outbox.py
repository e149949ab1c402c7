"""`tidemark outbox`: what waits to be published, and what is held back."""

from __future__ import annotations

import asyncio
import json

import click

from sinks import outbox as waiting
from sinks.database import open_connection
from streams.settings import load
from tidemark.commands import output

_SHOWN = 1_000


@click.command()
@click.option("--retry", is_flag=True, help="Ask the relay to try the messages held back now, and not in a minute.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def outbox(retry: bool, as_json: bool) -> None:
    """Show how much waits to be published, and the messages that hold their keys back."""
    backlog, refused = asyncio.run(_run(retry))
    if as_json:
        summary = {"pending": backlog.pending, "held": backlog.held, "oldest_seconds": backlog.oldest_seconds}
        output.echo_json(json.dumps({**summary, "refused": refused}, indent=2, default=str))
        return
    waits = f"{backlog.pending:,} messages wait, the oldest for {backlog.oldest_seconds:,.0f} s"
    output.echo(f"{waits}; {backlog.held:,} are held back")
    for row in refused[:_SHOWN]:
        output.echo(
            f"{row['id']}  {row['topic']}  {row['message_key']}  since {row['held_at']}  {row['failure_reason']}"
        )
    if len(refused) > _SHOWN:
        output.echo(f"… and {len(refused) - _SHOWN:,} more: --json lists them all")
    if retry:
        output.echo("the relay has been asked to try them again")


async def _run(retry: bool) -> tuple[waiting.Backlog, list[dict[str, object]]]:
    async with open_connection(load().dsn) as connection:
        if retry:
            await waiting.ask_to_retry(connection)
        return await waiting.backlog(connection), await waiting.refused(connection)


COMMANDS = [outbox]
