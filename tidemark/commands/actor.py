"""The option that says who acts."""

from __future__ import annotations

import getpass
from typing import Any

import click

_LONGEST = 100


class _Actor(click.ParamType):
    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = str(value).strip()
        if not name or len(name) > _LONGEST or not name.isprintable():
            self.fail(f"expected a name of 1 to {_LONGEST} printable characters", param, ctx)
        return name


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


actor_option = click.option(
    "--actor", type=_Actor(), default=_me, show_default="your user name", help="Who does it, for operator_actions."
)
