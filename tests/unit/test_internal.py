"""What the roles send one another: whatever is no such record is skipped and counted, and nothing is raised."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams import metrics
from streams.internal import KINDS, Drawn, Skipped, decode_job, decode_status, decode_trigger
from streams.records import Refused
from tables.triggers import Entry

TRIGGER: dict[str, Any] = {"security_id": "S", "earliest_impacted_date": "2025-01-02", "seq": 7, "reason": "price"}
JOB: dict[str, Any] = {
    "job_id": 7, "security_id": "S", "earliest_impacted_date": "2025-01-02", "seq": 7,
    "created_at": "2025-01-02T00:00:00Z",
}  # fmt: skip
STATUS: dict[str, Any] = {"job_id": 7, "security_id": "S", "status": "COMPLETE", "keys_total": None}
DECODERS = [(decode_trigger, TRIGGER), (decode_job, JOB), (decode_status, STATUS)]


@dataclass
class Record:
    key: bytes | None
    value: bytes | None


def counted(topic: str) -> dict[str, float]:
    found = {kind: metrics.INTERNAL_SKIPPED.labels(topic, kind)._value.get() for kind in KINDS}
    return {kind: value for kind, value in found.items() if value}


@pytest.mark.parametrize(("decode", "fields"), DECODERS)
def test_a_record_of_ours_is_taken(decode: Any, fields: dict[str, Any]) -> None:
    found = Skipped("ours").read(decode, Record(b"S", json.dumps(fields).encode()))
    assert found is not None
    assert found.security_id == "S"
    assert counted("ours") == {}


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        (b"S", None, "malformed"),
        (b"S", b"", "malformed"),
        (b"S", b"\xff", "malformed"),
        (b"S", b"{}", "invalid"),
        (b"S", b'{"x":' + b"[" * 100_000, "malformed"),
        (b"S", Refused(b"", "too_large", "600 MB"), "too_large"),
        (b"S", b" " * (2**20 + 1), "too_large"),
        (None, TRIGGER, "key"),
        (b"\xff", TRIGGER, "key"),
        (b"T", TRIGGER, "key"),
        (b"S", {**TRIGGER, "seq": 2**70}, "invalid"),
        (b"S", {**TRIGGER, "seq": 0}, "invalid"),
        (b"S", {**TRIGGER, "earliest_impacted_date": "0001-01-01"}, "invalid"),
        (b"a\0", {**TRIGGER, "security_id": "a\0"}, "invalid"),
        (b"", {**TRIGGER, "security_id": ""}, "invalid"),
        (b"x" * 201, {**TRIGGER, "security_id": "x" * 201}, "invalid"),
    ],
)
def test_what_is_none_of_ours_is_skipped_counted_and_logged_once(
    key: bytes | None, value: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    topic = f"t{Random().random()}"
    skipped = Skipped(topic)
    record = Record(key, json.dumps(value).encode() if isinstance(value, dict) else value)
    with caplog.at_level(logging.ERROR):
        assert [skipped.read(decode_trigger, record) for _ in range(3)] == [None] * 3
    assert counted(topic) == {kind: 3}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": 2**63},
        {"created_at": "2025-01-02T00:00:00"},
        {"created_at": "0001-01-01T00:00:00+14:00"},
        {"created_at": "9999-12-31T23:59:59-14:00"},
        {"earliest_impacted_date": "1899-12-31"},
    ],
)
def test_a_job_that_postgres_could_not_take_is_skipped(change: dict[str, Any]) -> None:
    record = Record(b"S", json.dumps({**JOB, **change}).encode())
    assert Skipped("jobs").read(decode_job, record) is None


@given(st.sampled_from(DECODERS), st.binary(max_size=5), st.integers(0, 200), st.integers(0, 5))
def test_no_bytes_are_raised_about(which: Any, noise: bytes, place: int, gone: int) -> None:
    decode, fields = which
    value = json.dumps(fields).encode()
    changed = value[:place] + noise + value[place + gone :]
    found = Skipped("noise").read(decode, Record(b"S", changed))
    assert found is None or found.security_id == "S"


def test_an_unreadable_row_of_the_table_counts_as_empty() -> None:
    rows = Skipped("rows")
    assert rows.entry(None) is None
    assert rows.entry(b"[]") == Entry()
    assert rows.entry(b"\xff") == Entry()
    assert counted("rows") == {"invalid": 1, "malformed": 1}


def test_only_rows_are_taken_from_the_changelog() -> None:
    rows = Skipped("changelog")
    assert rows.holds(b"S", None)
    assert rows.holds(b"S", json.dumps({"in_flight": JOB, "pending": TRIGGER}).encode())
    assert not any(rows.holds(key, b"{}") for key in (None, b"", b"\xff"))
    assert not any(rows.holds(b"S", value) for value in (b"", b"\xff", b"[]", b'{"in_flight": 3}'))


async def test_a_number_is_asked_about_only_above_what_is_known() -> None:
    asked = []
    last = [10]

    async def ask() -> int:
        asked.append(last[0])
        return last[0]

    drawn = Drawn(ask)
    assert await drawn.holds(10)
    assert await drawn.holds(9)
    assert asked == [10]
    assert not await drawn.holds(2**62)
    last[0] = 11
    assert await drawn.holds(11)
    assert asked == [10, 10, 11]


async def test_without_an_answer_a_number_is_believed() -> None:
    async def ask() -> int:
        raise ConnectionResetError

    assert await Drawn(ask).holds(7)


def test_the_highest_number_of_a_row_counts() -> None:
    entry = Skipped("rows").entry(json.dumps({"in_flight": JOB, "pending": {**TRIGGER, "seq": 9}}).encode())
    assert entry is not None
    assert entry.highest == 9
    assert Entry().highest == 0
