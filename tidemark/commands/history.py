"""`tidemark history` and `tidemark values`: what a position was, is, was worth, and what a correction made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

import click
import msgspec
from rich.table import Table

from sinks import ledger, monitor
from sinks.bitemporal import History, open_history
from sinks.database import open_connection
from sinks.ranges import EPOCH
from streams.settings import load
from tidemark.commands import output
from tidemark.commands.numbers import Number

_DIFFERENCE = ("transaction_id", "change", "old_quantity", "new_quantity", "old_cost_basis", "new_cost_basis",
               "old_realized_gain_loss", "new_realized_gain_loss")  # fmt: skip
_VALUES = ("valuation_date", "quantity", "cost_basis", "price", "market_value", "valuation_status", "provisional",
           "provisional_since_seq")  # fmt: skip
_POSITION = ("sequence", "transaction_id", "position_date", "epoch", "quantity", "cost_basis", "realized_gain_loss")


@click.command()
@click.argument("portfolio")
@click.argument("security")
@click.option("--as-of", type=click.DateTime(["%Y-%m-%d"]), help="Only the position at the end of this date.")
@click.option("--known-at", help="As it was known at this moment (ISO 8601; without offset UTC).")
@click.option("--epoch", type=Number(EPOCH), help="As it stood at the end of this epoch.")
@click.option(
    "--diff", type=(Number(EPOCH), Number(EPOCH)), metavar="OLD NEW", help="What changed from epoch OLD to epoch NEW."
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def history(
    portfolio: str,
    security: str,
    as_of: datetime | None,
    known_at: str | None,
    epoch: int | None,
    diff: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Show the position history of SECURITY in PORTFOLIO, now or as it was known.

    Epochs number the versions of the history: each back-dated transaction, amendment or cancellation makes one.
    """
    if sum((diff is not None, epoch is not None, as_of is not None or known_at is not None)) > 1:
        raise click.UsageError("--diff, --epoch and --as-of/--known-at exclude each other")
    moment = _moment(known_at) if known_at else None
    rows = asyncio.run(_read(portfolio, security, as_of, moment, epoch, diff))
    if as_json:
        output.echo_json(msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(rows)).decode())
    elif rows:
        _print(rows, _DIFFERENCE if diff else _POSITION)
    else:
        output.echo("no difference" if diff else "nothing was held or traded by then")


async def _read(
    portfolio: str,
    security: str,
    as_of: datetime | None,
    moment: datetime | None,
    epoch: int | None,
    diff: tuple[int, int] | None,
) -> list[dict[str, object]]:
    async with open_history(load().dsn, portfolio, security) as found:
        await _check_epochs(found, portfolio, security, diff or (() if epoch is None else (epoch,)))
        if diff:
            return await found.difference(*diff)
        if as_of:
            return await found.as_of(as_of.date(), moment)
        return await found.known_at(moment) if epoch is None else await found.of_epoch(epoch)


@click.command()
@click.argument("portfolio")
@click.argument("security")
@click.option("--days", type=click.IntRange(1, 10_000), default=260, show_default=True, help="At most, the latest.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def values(portfolio: str, security: str, days: int, as_json: bool) -> None:
    """Show what SECURITY in PORTFOLIO was worth on each business date.

    A provisional date waits to be valued (again): a correction, whatever holds it up, or the date's closing has not
    got there yet. The last column names the oldest such correction.
    """
    rows = asyncio.run(_values(portfolio, security, days))
    if as_json:
        output.echo_json(msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(rows)).decode())
    elif rows:
        _print(rows, _VALUES)
    else:
        output.echo("not valued on any date yet")


async def _values(portfolio: str, security: str, days: int) -> list[dict[str, object]]:
    async with open_connection(load().dsn) as connection:
        if await monitor.read_key(connection, portfolio, security, limit=1) is None:
            raise click.ClickException(f"portfolio {portfolio} has never held {security}")
        return await ledger.daily_values(connection, portfolio, security, days)


async def _check_epochs(found: History, portfolio: str, security: str, asked: Sequence[int]) -> None:
    newest = await found.epoch()
    if newest is None:
        raise click.ClickException(f"portfolio {portfolio} has never held {security}")
    if wrong := [epoch for epoch in asked if not 0 <= epoch <= newest]:
        raise click.ClickException(f"there is no epoch {wrong[0]}: the epochs of this key are 0 to {newest}")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"not an ISO 8601 timestamp: {text}", param_hint="--known-at") from None


def _print(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("transaction_id", "change") else "right")
    for row in rows:
        output.add_row(table, (_text(row[column]) for column in columns))
    console = output.console()
    console.print(table) if console.is_terminal else output.console(width=200).print(table)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Decimal):
        return f"{value.normalize():,f}"
    return "" if value is None else str(value)


COMMANDS = [history, values]
