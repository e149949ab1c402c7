"""Where each worker of the valuation begins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sinks.claims import begun, place


def test_each_next_worker_begins_in_the_largest_gap() -> None:
    assert [place(slot) for slot in range(8)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_the_first_keeps_the_order() -> None:
    assert begun(["a", "b", "c"], 3, place(0)) == (["a", "b", "c"], 0)


def test_a_place_within_the_only_security() -> None:
    assert begun(["giant"], 1, 0.75) == (["giant"], 0.75)


def test_nobody_begins_within_one_of_a_crowd() -> None:
    queue, within = begun([str(number) for number in range(1_001)], 1_001, 0.5)
    assert (queue[0], within) == ("500", 0)


@given(st.lists(st.text(), unique=True), st.integers(0, 63), st.data())
def test_nothing_is_left_out_and_what_has_priority_stays_first(
    queue: list[str], slot: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(queue)))
    turned, within = begun(queue, first, place(slot))
    assert sorted(turned[:first]) == sorted(queue[:first])
    assert turned[first:] == queue[first:]
    assert 0 <= within < 1
