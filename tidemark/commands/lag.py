"""`tidemark lag`: how far each consumer group is behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import click
from rich.table import Table

from sinks.database import open_connection
from streams.lag import LagUnknown, PartitionLag, read_lag
from streams.settings import Settings, load
from tidemark.commands import output


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--all", "everything", is_flag=True, help="Show partitions without lag, too.")
def lag(as_json: bool, everything: bool) -> None:
    """Show consumer lag per group, topic and partition, in records and in seconds.

    Seconds are the age of the first record that is not consumed. Works while no worker is alive.
    """
    try:
        found = asyncio.run(_read(load()))
    except LagUnknown as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        output.echo_json(json.dumps([asdict(row) for row in found], indent=2))
        return
    shown = [row for row in found if everything or row.lag]
    if shown:
        output.console().print(_table(shown))
    behind = sum(row.lag for row in found)
    output.echo(f"{behind:,} records behind in {len(found)} partitions" if behind else "nothing is behind")


async def _read(settings: Settings) -> list[PartitionLag]:
    async with open_connection(settings.dsn) as connection:
        return await read_lag(settings, connection)


def _table(rows: list[PartitionLag]) -> Table:
    table = Table("group", "topic", box=None)
    for name in ("partition", "position", "end", "lag", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        position = "never read" if row.position is None else f"{row.position:,}"
        numbers = (f"{row.end_offset:,}", f"{row.lag:,}", f"{row.lag_seconds:,.1f}")
        output.add_row(table, (row.consumergroup, row.topic, str(row.partition), position, *numbers))
    return table


COMMANDS = [lag]
