"""The local stack's one kind of failure."""

from __future__ import annotations


class StackError(Exception):
    """The local stack cannot do what was asked; the message is one line that says why and what to do."""
