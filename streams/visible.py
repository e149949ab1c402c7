"""Text of others as people may read it: what has no shape, or moves its neighbours, is shown as an escape."""

from __future__ import annotations

import json
from unicodedata import category

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control and format characters (U+202E turns a line around), lone surrogates, and separators of lines."""


def visible(text: str) -> str:
    """On one line, with `\\x0a`, `\\u202e` and the like for what cannot be seen. Everything else stays."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(each) if category(each) in _UNSEEN else each for each in text)


def lines(text: str) -> str:
    """Of several lines, each visible, all but the first indented, so that none can pass for the first of another."""
    return "\n    ".join(visible(line) for line in text.split("\n"))


def visible_json(document: str) -> str:
    """The same document: what cannot be seen is written as JSON's own escapes, so that it means the same."""
    return "".join(json.dumps(each)[1:-1] if category(each) in _UNSEEN and each != "\n" else each for each in document)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
