"""Every difference between the books as they must be and as the tables have them, one line each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from typing import Any, TypeAlias

from tidemark.oracle.model import Books, HistoryRow, Key, SnapshotRow

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Actual:
    """Rows read from the tables. history: the live rows only (not superseded)."""

    history: Sequence[Row]
    snapshots: Sequence[Row]
    states: Sequence[Row]


def compare(expected: Books, actual: Actual, *, latest: date | None, waiting: Collection[Key] = ()) -> list[str]:
    """List what differs; empty when the books are right.

    latest is L, None before the first date closes. Keys in waiting (those of the view dirty_keys) are not
    expected to have right snapshots or watermarks yet; their history must be right all the same, since it is
    written together with the transactions.
    """
    states = {_key(row): row for row in actual.states}
    history, snapshots = _grouped(actual.history), _grouped(actual.snapshots)
    keys = sorted({*expected.history, *history, *snapshots, *states})
    lines: list[str] = []
    for key in keys:
        wanted, found = expected.history.get(key, []), history.get(key, [])
        lines += _history_lines(key, wanted, found)
        lines += _state_lines(key, wanted, [*found, *snapshots.get(key, [])], states.get(key))
        if key not in waiting:
            lines += _snapshot_lines(key, expected.snapshots.get(key, []), snapshots.get(key, []))
            lines += _watermark_lines(key, wanted, states.get(key), latest)
    return lines


def _history_lines(key: Key, expected: Sequence[HistoryRow], actual: Sequence[Row]) -> Iterator[str]:
    wanted = {row.sequence: row for row in expected}
    found: dict[int, Row] = {}
    for row in actual:
        if row["sequence"] in found:
            yield _line(key, f"history {row['sequence']}", "more than one live row")
        found[row["sequence"]] = row
    for sequence in sorted({*wanted, *found}):
        yield from _row_lines(key, f"history {sequence}", wanted.get(sequence), found.get(sequence))


def _snapshot_lines(key: Key, expected: Sequence[SnapshotRow], actual: Sequence[Row]) -> Iterator[str]:
    wanted = {row.valuation_date: row for row in expected}
    found = {row["valuation_date"]: row for row in actual}
    for day in sorted({*wanted, *found}):
        yield from _row_lines(key, f"snapshot {day}", wanted.get(day), found.get(day))


def _row_lines(key: Key, what: str, expected: HistoryRow | SnapshotRow | None, actual: Row | None) -> Iterator[str]:
    if expected is None:
        yield _line(key, what, "is there, should not be")
    elif actual is None:
        yield _line(key, what, "is missing")
    else:
        for column in fields(expected):
            want, have = getattr(expected, column.name), actual[column.name]
            if want != have:
                yield _line(key, what, f"{column.name} is {_text(have)}, should be {_text(want)}")


def _state_lines(key: Key, expected: Sequence[HistoryRow], rows: Iterable[Row], state: Row | None) -> Iterator[str]:
    """A key with transactions has a state, and no row is of an epoch that the key has not reached."""
    if state is None:
        if expected:
            yield _line(key, "state", "is missing")
        return
    newest = max((row["epoch"] for row in rows), default=0)
    if newest > state["epoch"]:
        yield _line(key, "state", f"epoch is {state['epoch']}, but a row has epoch {newest}")


def _watermark_lines(key: Key, expected: Sequence[HistoryRow], state: Row | None, latest: date | None) -> Iterator[str]:
    """A watermark reaches L; it is beyond L only where the key's first position date is later still."""
    if state is None or latest is None:
        return
    watermark: date = state["watermark_date"]
    if watermark < latest:
        yield _line(key, "state", f"watermark is {watermark}, should be {latest}")
    elif watermark > latest and expected and expected[0].position_date <= watermark:
        yield _line(key, "state", f"watermark is {watermark}, beyond the latest closed date {latest}")


def _grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def _key(row: Row) -> Key:
    return (row["portfolio_id"], row["security_id"])


def _line(key: Key, what: str, problem: str) -> str:
    return f"portfolio {key[0]}, security {key[1]}, {what}: {problem}"


def _text(value: object) -> str:
    return "null" if value is None else f"{value}"
