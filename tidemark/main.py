"""The console script `tidemark`: one line and a non-zero exit on error, `--help` on every command."""

from __future__ import annotations

import asyncio
import json
import logging
from importlib import import_module
from typing import Any

import click
from pydantic import SecretStr

from deploy.local.errors import StackError
from sinks import database, operations
from streams.settings import Settings, SettingsError, load
from streams.topics import TopicError
from streams.visible import visible
from tidemark.commands.output import echo, echo_json

_MODULES = {
    "up": "stack", "status": "status", "down": "stack", "demo": "demo", "worker": "worker", "topics": "worker",
    "acls": "worker", "produce": "produce", "audit": "audit", "history": "history", "values": "history", "jobs": "jobs",
    "pause": "jobs", "resume": "jobs", "throttle": "jobs", "impact": "jobs", "reprocess": "jobs",
    "lag": "lag", "outbox": "outbox",
    "after-restore": "restore",
}  # fmt: skip
"""Where each command is; a module is imported for its own commands only, so that workers start sooner."""


class _Commands(click.Group):
    """Errors that an operator can act on are one line, never a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_MODULES])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return super().get_command(ctx, cmd_name)
        commands: list[click.Command] = import_module(f"tidemark.commands.{_MODULES[cmd_name]}").COMMANDS
        return next(command for command in commands if command.name == cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for each in args:
            if any("\ud800" <= character <= "\udfff" for character in each):  # bytes of another encoding
                ctx.fail(f"{visible(each)}: not UTF-8")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.ClickException as error:
            told = click.ClickException(visible(error.format_message()))
            told.exit_code = error.exit_code
            raise told from None
        except (SettingsError, StackError, TopicError, database.DatabaseError, operations.Refused) as error:
            raise click.ClickException(visible(str(error))) from None


@click.group(cls=_Commands)
@click.version_option(package_name="tidemark")
def main() -> None:
    """Keep a portfolio ledger right when prices and transactions arrive late."""
    # A command reports what failed in one line of its own; workers set their own level.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


@main.command()
def migrate() -> None:
    """Create the schema, or upgrade it."""
    applied = asyncio.run(database.migrate(load().dsn))
    for line in [f"applied {name}" for name in applied] or ["the schema is up to date"]:
        echo(line)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def settings(as_json: bool) -> None:
    """List every setting with its value; secrets are masked."""
    current = load()
    rows = [
        {"name": f"TIDEMARK_{name.upper()}", "value": _shown(current, name), "description": field.description or ""}
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        echo_json(json.dumps(rows, indent=2))
        return
    for row in rows:
        echo(f"{row['name']}={row['value'] if row['value'] is not None else ''}  # {row['description']}")


def _shown(current: Settings, name: str) -> Any:
    value = getattr(current, name)
    if isinstance(value, SecretStr):
        return "********"
    return value if value is None or isinstance(value, int | float) else str(value)
