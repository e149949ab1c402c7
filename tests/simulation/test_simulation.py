"""The topology on models: right whatever happens in whatever order; and wrong, soon, when a guard is taken out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulation.judge import run_once, search
from tests.simulation.ledger import without_waiting
from tests.simulation.scheduler import Choices, shrink
from tests.simulation.traps import TRAPS, Trap
from tests.simulation.world import World

_RUNS = 400
_RUNS_TO_FIND_A_TRAP = 10_000


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_waiting(patch)
        yield


def test_the_books_are_right_whatever_happens_in_whatever_order() -> None:
    found = search(World, 1, _RUNS, 120)
    assert found.wrong == [], f"seed {found.seed}, shrunk to {found.shrunk}"
    assert found.runs == _RUNS


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without its guard, the same from its seed and from its choices; with the guard that run is right."""
    with monkeypatch.context() as patch:
        trap.sabotage(patch)
        found = search(trap.make, trap.seed, _RUNS_TO_FIND_A_TRAP, 240, shrinking=False)
        assert found.wrong, f"not found in {found.runs} runs"
        assert found.seed is not None
        assert run_once(trap.make, Choices(found.seed))[1] == found.wrong
        assert run_once(trap.make, Choices(replay=found.choices))[1] == found.wrong
    assert run_once(trap.make_guarded, Choices(replay=found.choices))[1] == []


def test_a_failure_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    trap = next(trap for trap in TRAPS if trap.name == "a replay that triggers a replay")
    trap.sabotage(monkeypatch)
    found = search(trap.make, 1, 100, 60)
    assert run_once(trap.make, Choices(replay=found.shrunk))[1] != []
    assert len(found.shrunk) < len(found.choices) / 10


def test_shrinking_keeps_what_matters() -> None:
    assert shrink([5, 0, 9, 3, 7, 1], lambda numbers: 9 in numbers and 7 in numbers) == [9, 7]
