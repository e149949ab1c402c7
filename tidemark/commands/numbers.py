"""Numbers as arguments and options: each has a range, of those that settings and the web have too."""

from __future__ import annotations

from typing import Any

import click

from sinks.ranges import OutOfRange, Real, Whole


class Number(click.ParamType):
    """A number within a range; click's own types take `nan`, or have no range at all."""

    name = "number"

    def __init__(self, numbers: Whole | Real) -> None:
        self.numbers = numbers

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error in one line."""
        try:
            return self.numbers.parse(str(value))
        except OutOfRange as error:
            self.fail(str(error), param, ctx)
