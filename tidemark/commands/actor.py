"""The option that says who acts."""

from __future__ import annotations

import getpass

import click


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


actor_option = click.option(
    "--actor", default=_me, show_default="your user name", help="Who does it, for operator_actions."
)
