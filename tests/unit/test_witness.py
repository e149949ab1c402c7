"""What the end of the topic `tidemark-generation` says, whatever is written there."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from sinks.generation import Installation
from streams.witness import Tail, read


@dataclass
class Record:
    key: bytes | None
    value: bytes | None


def mark(fence: int, number: int, **more: object) -> Record:
    said = {"fence": fence, "round": number, "generation": 0, "event_id": 5, "seq": 6, **more}
    return Record(b"mark", json.dumps(said).encode())


def fence(instance: str) -> Record:
    return Record(b"fence", json.dumps({"instance": instance}).encode())


def here(fence: int, number: int, instance: str = "ours") -> Installation:
    return Installation(True, instance, fence, 0, number, {})


def test_the_furthest_mark_counts_not_the_last() -> None:
    """A relay that was frozen may send an old one late."""
    tail = read([mark(0, 7), mark(0, 8), mark(0, 7, done=True)])
    assert tail.mark
    assert (tail.mark.round, tail.mark.done) == (8, False)


def test_a_mark_under_a_later_fence_is_further() -> None:
    tail = read([mark(0, 900), fence("other"), mark(40, 3)])
    assert tail.mark
    assert tail.mark.place == (40, 3)
    assert tail.is_ahead_of(here(0, 901))
    assert not tail.is_ahead_of(here(40, 3))


def test_the_end_of_a_round_is_said_under_its_own_place() -> None:
    tail = read([mark(0, 7), mark(0, 7, done=True)])
    assert tail.mark
    assert tail.mark.done
    assert not tail.is_ahead_of(here(0, 7))
    assert tail.is_ahead_of(here(0, 6))


@pytest.mark.parametrize(
    ("records", "superseded"),
    [
        ([], False),
        ([fence("ours"), mark(0, 7)], False),
        ([mark(0, 7), fence("other")], True),
        ([fence("other"), fence("ours")], False),
        ([fence("ours"), mark(1, 1)], True),
    ],
)
def test_a_database_is_superseded_by_the_fence_of_another(records: list[Record], superseded: bool) -> None:
    assert read(records).supersedes(here(0, 7)) is superseded


@pytest.mark.parametrize(
    "record",
    [
        Record(None, None), Record(b"mark", None), Record(b"fence", None), Record(b"mark", b"\xff"),
        Record(b"x", b"{}"),
        Record(b"fence", b"[]"), mark(0, 2**70), mark(-2, 9), mark(0, 9, generation=10**9), Record(b"mark", b"{}"),
    ],
)  # fmt: skip
def test_what_is_neither_mark_nor_fence_says_nothing(record: Record) -> None:
    assert read([mark(0, 7), record]) == read([mark(0, 7)])
    assert read([record]) == Tail()


def test_a_fence_says_the_last_mark_again() -> None:
    """However many fences a worker writes that cannot go on, the mark stays in sight."""
    last = {"fence": 0, "round": 7, "generation": 0, "event_id": 5, "seq": 6}
    again = Record(b"fence", json.dumps({"instance": "ours", "last": last}).encode())
    assert read([again]).is_ahead_of(here(0, 6))
    assert not read([mark(0, 8), again]).is_ahead_of(here(0, 8))
