"""Templates, and how numbers, ages and identifiers are shown."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from typing import Any

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from streams.visible import visible
from streams.web.links import local_path, quoted, segment

OPERATOR = web.RequestKey("operator", str)  # who looks or acts; absent where nobody has shown the token


@cache
def environment() -> Environment:
    """The templates; everything is escaped, and what cannot be seen is shown as an escape (`exact`: not in a field)."""
    found = Environment(
        loader=PackageLoader("streams.web"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=number, decimal=decimal, age=age, seconds=seconds, moment=moment, segment=segment, plural=plural,
        quoted=quoted, exact=escape, block=block, has_unseen=has_unseen,
    )  # fmt: skip
    return found


def page(
    request: web.Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> web.Response:
    """A whole page, or the part of one that htmx asks for."""
    here = local_path(str(request.rel_url))
    text = (
        environment()
        .get_template(template)
        .render(path=request.path, here=here, operator=request.get(OPERATOR), **values)
    )
    return web.Response(text=text, content_type="text/html", status=status, headers=headers)


def fragment(template: str, **values: Any) -> str:
    """A piece of a page, for server-sent events."""
    return environment().get_template(template).render(**values)


def _visible(value: Any) -> Any:
    """What a template puts out; Markup is whole already."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def block(value: str) -> Markup:
    """A text of many lines, of which breaks and tabs stay."""
    return escape("\n".join("\t".join(map(visible, line.split("\t"))) for line in value.split("\n")))


def has_unseen(value: str) -> bool:
    """Whether something in a text of many lines cannot be seen."""
    return str(block(value)) != str(escape(value))


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


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 key`, `2 keys`."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
