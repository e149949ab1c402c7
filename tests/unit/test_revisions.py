"""Which revision counts (contract, Input topics)."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from itertools import permutations

from sinks.model import Transaction
from sinks.revisions import fold


def version(revision: int, quantity: str = "1", cancelled: bool = False) -> Transaction:
    at = datetime(2025, 9, 1, tzinfo=UTC)
    amount = Decimal(quantity)
    return Transaction("T", "P", "S", at, "BUY", amount, Decimal(1), amount, revision=revision, cancelled=cancelled)


def test_the_highest_revision_wins_whatever_the_order() -> None:
    versions = [version(0), version(1, "2"), version(2, cancelled=True)]
    for order in permutations(versions):
        assert fold(None, list(enumerate(order))).winner == versions[2]


def test_the_stored_one_stays_when_nothing_is_higher() -> None:
    folded = fold(version(1), [(0, version(0)), (1, version(1))])
    assert (folded.winner, folded.ignored, folded.conflicts) == (None, 2, {})


def test_the_same_revision_with_other_content_is_a_conflict_and_the_first_stays() -> None:
    folded = fold(None, [(4, version(1)), (5, version(1, "2")), (6, version(1, "1.00"))])
    assert folded.winner == version(1)
    assert list(folded.conflicts) == [5]
    assert folded.ignored == 1
