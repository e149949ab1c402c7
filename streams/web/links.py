"""Addresses of the console's own pages: identifiers of any characters as segments, and paths that stay on this site."""

from __future__ import annotations

import re
from urllib.parse import quote

from yarl import URL

from streams.visible import visible

_DOTS = re.compile(r"~*\.{1,2}")  # browsers and servers resolve `.` and `..`, however they are encoded


def segment(value: str) -> str:
    """An identifier as one segment of a path. `.` and `..` have `~` before them, and so have those that begin so."""
    return quote(f"~{value}" if _DOTS.fullmatch(value) else value, safe="")


def from_segment(text: str) -> str:
    """The identifier that a decoded segment names."""
    return text[1:] if text.startswith("~") and _DOTS.fullmatch(text) else text


def quoted(value: str) -> str:
    """A text as a value in the query."""
    return quote(value, safe="")


def local_path(target: str) -> str:
    """The target where it is a path of this console, else `/`.

    Browsers drop tabs and line breaks and take `\\` for `/`: `/\\t/host` and `/\\host` are other sites to them.
    """
    if not target.startswith("/") or target.startswith("//") or "\\" in target or visible(target) != target:
        return "/"
    try:
        return target if URL(target).host is None else "/"
    except ValueError:
        return "/"
