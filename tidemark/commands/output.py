"""What commands print: text of others is text, never markup, and what cannot be seen is shown as an escape."""

from __future__ import annotations

from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.visible import visible, visible_json


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Where tables and progress go; square brackets and colons mean nothing to it."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def echo(line: str, *, err: bool = False) -> None:
    """One line."""
    click.echo(visible(line), err=err)


def echo_json(document: str) -> None:
    """A document for machines, which means exactly what it meant."""
    click.echo(visible_json(document))


def text(value: str) -> Text:
    """A cell, a title or a step."""
    return Text(visible(value))


def add_row(table: Table, cells: Iterable[str]) -> None:
    """A row of text."""
    table.add_row(*map(text, cells))
