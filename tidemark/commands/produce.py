"""`tidemark produce`: a file into an input topic."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streams import produce as producing
from streams.settings import load
from tidemark.commands import output

_SHOWN = 10


@click.command()
@click.argument("topic", type=click.Choice(producing.INPUT_TOPICS))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), help="Default: by the file's name, else jsonl.")
def produce(topic: str, file: Path, form: str | None) -> None:
    """Send a CSV or JSON-lines FILE (or - for standard input) to TOPIC.

    Every record is validated first: if one is bad, none is sent.
    """
    settings = load()
    settings.broker  # noqa: B018 - say that nothing is named before a long file is read
    text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    is_csv = form == "csv" if form else file.suffix.lower() == ".csv"
    try:
        lines = list(producing.read_lines(topic, text, is_csv=is_csv))
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{file}: not UTF-8: {error}") from None
    bad = [line for line in lines if line.problem]
    for line in bad[:_SHOWN]:
        output.echo(f"{file}:{line.number}: {line.problem}", err=True)
    if bad:
        raise click.ClickException(f"{len(bad)} of {len(lines)} records are bad; nothing was sent")
    columns = (
        TextColumn(f"Sending to {topic}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=output.console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(lines))
        sent = asyncio.run(producing.send(settings, topic, lines, lambda count: progress.advance(task, count)))
    output.echo(f"{sent:,} records sent to {settings.topic(topic)}")


COMMANDS = [produce]
