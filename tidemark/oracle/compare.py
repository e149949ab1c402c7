"""Every difference between the books as they must be and as the tables have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Literal, NamedTuple, TypeAlias

from tidemark.oracle.model import Books, HistoryRow, Key, SnapshotRow

Table: TypeAlias = Literal["position_history", "daily_position_snapshots", "position_state"]
_SHORT: dict[Table, str] = {
    "position_history": "history",
    "daily_position_snapshots": "snapshot",
    "position_state": "state",
}


class StateRow(NamedTuple):
    """A key's row of `position_state`, and how far its security counts as valued (None: not known at all).

    closed_on: the date from whose end on it holds nothing, or a later one; None while it holds something.
    """

    epoch: int
    watermark_date: date
    status: str
    valued_through: date | None
    closed_on: date | None = None


@dataclass(frozen=True, slots=True)
class Actual:
    """Rows read from the tables, by key. history: the live rows only (not superseded); epochs: the highest of any."""

    history: Mapping[Key, Sequence[HistoryRow]] = field(default_factory=dict)
    snapshots: Mapping[Key, Sequence[SnapshotRow]] = field(default_factory=dict)
    states: Mapping[Key, StateRow] = field(default_factory=dict)
    epochs: Mapping[Key, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it must be. place: the sequence of a history row, the date of a snapshot.

    day: the first date on which it may matter, None where the key's whole history is in doubt. column, actual and
    expected where a single value differs, as text.
    """

    portfolio_id: str
    security_id: str
    table: Table
    place: str
    problem: str
    day: date | None
    column: str | None = None
    actual: str | None = None
    expected: str | None = None

    @property
    def key(self) -> Key:
        """The key concerned."""
        return (self.portfolio_id, self.security_id)

    def __str__(self) -> str:
        what = f"{_SHORT[self.table]} {self.place}".rstrip()
        return f"portfolio {self.portfolio_id}, security {self.security_id}, {what}: {self.problem}"


def compare(
    expected: Books, actual: Actual, *, latest: date | None, dirty: Mapping[Key, date] | None = None
) -> list[Difference]:
    """List what differs; empty when the books are right.

    latest is L, None before the first date closes. Keys in dirty (those of the view dirty_keys) are not expected to
    have right snapshots from the given date on, nor a watermark that reaches L; their history must be right all the
    same, since it is written together with the transactions.
    """
    dirty = dirty or {}
    keys = sorted({*expected.history, *actual.history, *actual.snapshots, *actual.states})
    found: list[Difference] = []
    for key in keys:
        wanted = expected.history.get(key, [])
        found += _history(key, wanted, actual.history.get(key, []))
        found += _state(key, wanted, actual.states.get(key), actual.epochs.get(key, 0))
        snapshots = expected.snapshots.get(key, [])
        found += _watermark(key, wanted, snapshots, actual.states.get(key), latest, is_dirty=key in dirty)
        found += _snapshots(key, snapshots, actual.snapshots.get(key, []), dirty.get(key, date.max))
    return found


def _history(key: Key, expected: Sequence[HistoryRow], actual: Sequence[HistoryRow]) -> Iterator[Difference]:
    if expected == actual:
        return
    wanted = {row.sequence: row for row in expected}
    found: dict[int, HistoryRow] = {}
    for row in actual:
        if row.sequence in found:
            yield Difference(*key, "position_history", str(row.sequence), "more than one live row", row.position_date)
        found[row.sequence] = row
    for sequence in sorted({*wanted, *found}):
        want, have = wanted.get(sequence), found.get(sequence)
        days = [row.position_date for row in (want, have) if row]
        yield from _rows(key, "position_history", str(sequence), want, have, min(days))


def _snapshots(
    key: Key, expected: Sequence[SnapshotRow], actual: Sequence[SnapshotRow], until: date
) -> Iterator[Difference]:
    if expected == actual:
        return
    wanted = {row.valuation_date: row for row in expected}
    found = {row.valuation_date: row for row in actual}
    for day in sorted({*wanted, *found}):
        if day < until:
            yield from _rows(key, "daily_position_snapshots", str(day), wanted.get(day), found.get(day), day)


def _rows(
    key: Key,
    table: Table,
    place: str,
    expected: HistoryRow | SnapshotRow | None,
    actual: HistoryRow | SnapshotRow | None,
    day: date,
) -> Iterator[Difference]:
    if expected is None:
        yield Difference(*key, table, place, "is there, should not be", day)
    elif actual is None:
        yield Difference(*key, table, place, "is missing", day)
    else:
        for column, want, have in zip(expected._fields, expected, actual, strict=True):
            if want != have:
                problem = f"{column} is {_text(have)}, should be {_text(want)}"
                yield Difference(*key, table, place, problem, day, column, _text(have), _text(want))


def _state(key: Key, expected: Sequence[HistoryRow], state: StateRow | None, newest: int) -> Iterator[Difference]:
    """A key with transactions has a state, and no row is of an epoch that the key has not reached."""
    if state is None:
        if expected:
            yield _of_state(key, "is missing", None)
    elif newest > state.epoch:
        problem = f"epoch is {state.epoch}, but a row has epoch {newest}"
        yield _of_state(key, problem, None, ("epoch", str(state.epoch), str(newest)))
    if state is not None and expected:
        yield from _closed(key, expected, state.closed_on)


def closing_date(history: Sequence[HistoryRow]) -> date | None:
    """From whose end on a key with this history holds nothing; None while it holds something."""
    closed = None
    for row in history:
        closed = (closed or row.position_date) if row.quantity == 0 else None
    return closed


def _closed(key: Key, expected: Sequence[HistoryRow], closed_on: date | None) -> Iterator[Difference]:
    """Corrections reach a key by closed_on: too early, or set while it holds something, they would pass it by."""
    closed = closing_date(expected)
    if (closed is None) != (closed_on is None) or (closed and closed_on and closed_on < closed):
        problem = f"closed_on is {_text(closed_on)}, should be {_text(closed)}"
        yield _of_state(key, problem, closed, ("closed_on", _text(closed_on), _text(closed)))


def _watermark(
    key: Key,
    history: Sequence[HistoryRow],
    snapshots: Sequence[SnapshotRow],
    state: StateRow | None,
    latest: date | None,
    *,
    is_dirty: bool,
) -> Iterator[Difference]:
    """A clean key's watermark reaches L, unless nothing is to be valued after it; it is beyond L only where the key's
    first position date is later still. A key that waits for a valuation must be one that the valuation will find.
    """
    if state is None or latest is None:
        return
    watermark = state.watermark_date
    if watermark < latest:
        if not snapshots or snapshots[-1].valuation_date <= watermark:
            return
        value = ("watermark_date", str(watermark), str(latest))
        if not is_dirty:
            problem = f"watermark is {watermark}, should be {latest}"
        elif state.valued_through is None or state.valued_through > watermark:
            problem = f"watermark is {watermark}, but the security counts as valued through {state.valued_through}"
        else:
            return
        yield _of_state(key, problem, watermark + timedelta(days=1), value)
    elif watermark > latest and history and history[0].position_date <= watermark:
        problem = f"watermark is {watermark}, beyond the latest closed date {latest}"
        yield _of_state(key, problem, latest, ("watermark_date", str(watermark), str(latest)))
    elif state.status != "CURRENT":
        problem = f"status is {state.status}, should be CURRENT"
        yield _of_state(key, problem, latest, ("status", state.status, "CURRENT"))


def _of_state(key: Key, problem: str, day: date | None, value: tuple[str, str, str] | None = None) -> Difference:
    return Difference(*key, "position_state", "", problem, day, *(value or (None, None, None)))


def _text(value: object) -> str:
    return "null" if value is None else f"{value}"
