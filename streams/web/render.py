"""Templates, and how numbers, ages and identifiers are shown."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from typing import Any
from urllib.parse import quote

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

OPERATOR = web.RequestKey("operator", str)  # who looks or acts; absent where nobody has shown the token


@cache
def environment() -> Environment:
    """The templates; everything is escaped."""
    found = Environment(
        loader=PackageLoader("streams.web"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=number, decimal=decimal, age=age, seconds=seconds, moment=moment, segment=segment, plural=plural
    )
    return found


def page(
    request: web.Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> web.Response:
    """A whole page, or the part of one that htmx asks for."""
    text = environment().get_template(template).render(path=request.path, operator=request.get(OPERATOR), **values)
    return web.Response(text=text, content_type="text/html", status=status, headers=headers)


def fragment(template: str, **values: Any) -> str:
    """A piece of a page, for server-sent events."""
    return environment().get_template(template).render(**values)


def number(value: float | None) -> str:
    """With thousands separated; a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}"


def decimal(value: Decimal | None) -> str:
    """Every digit that means something."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float | None) -> str:
    """A span of time, in the two units that matter."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if value >= size:
            rest = int(value % size // smaller_size)
            return f"{int(value // size)} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError


def age(value: datetime | None) -> str:
    """How long ago."""
    return "–" if value is None else f"{seconds((datetime.now(UTC) - value).total_seconds())} ago"


def moment(value: datetime | date | None) -> str:
    """A point in time, UTC."""
    if value is None:
        return "–"
    return f"{value:%Y-%m-%d %H:%M:%S} UTC" if isinstance(value, datetime) else value.isoformat()


def segment(value: str) -> str:
    """An identifier as one segment of a path, whatever characters it has."""
    return quote(value, safe="")


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 key`, `2 keys`."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
