"""The known traps of such engines, each with the guard that keeps Tidemark out of it and how to take that out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from sinks import booking, revisions
from sinks.model import Transaction
from sinks.revisions import Folded
from sinks.window import Window
from tables import triggers
from tests.simulation.books import Guards
from tests.simulation.scheduler import Choices
from tests.simulation.world import Faults, World

Sabotage = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Trap:
    """name: what goes wrong; guard: what keeps it from happening, and where that stands in the engine.

    guards and sabotage take it out, in the models and in the engine's own code. world, faults: what makes it come up
    sooner.
    """

    name: str
    guard: str
    guards: dict[str, bool]
    sabotage: Sabotage = lambda patch: None
    world: tuple[tuple[str, Any], ...] = ()
    faults: tuple[tuple[str, int], ...] = ()
    seed: int = 1
    """Where a search finds it at once, as long as the engine and the models stay as they are."""

    def make(self, choices: Choices) -> World:
        """A world without the guard. Nothing in it is lost, so no repair of corrections heals what is spoilt."""
        return World(choices, Guards(**self.guards), self._faults(), **dict(self.world))

    def make_guarded(self, choices: Choices) -> World:
        """The same world with the guard, for the same choices."""
        harmless = {name: value for name, value in self.world if name != "deadlock_is_poison"}
        return World(choices, faults=self._faults(), **harmless)

    def _faults(self) -> Faults:
        return Faults(lossy=False, **dict(self.faults))


def _overwrite_pending(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triggers, "_merge", lambda pending, trigger: trigger)


def _publish_every_trigger(patch: pytest.MonkeyPatch) -> None:
    def on_trigger(entry: Any, trigger: triggers.Trigger, now: datetime) -> triggers.Decision:
        return triggers._promote(trigger, now)

    patch.setattr(triggers, "on_trigger", on_trigger)


def _any_end_releases(patch: pytest.MonkeyPatch) -> None:
    def on_status(entry: triggers.Entry | None, status: triggers.Status, now: datetime) -> triggers.Decision:
        if entry is None or entry.in_flight is None or status.status not in triggers._TERMINAL:
            return triggers.Decision(entry)
        return triggers._promote(entry.pending, now) if entry.pending else triggers.Decision(None, release=True)

    patch.setattr(triggers, "on_status", on_status)


def _take_equal_revisions(patch: pytest.MonkeyPatch) -> None:
    def fold(stored: Transaction | None, versions: Sequence[tuple[int, Transaction]]) -> Folded:
        best = max((version for _, version in versions), key=lambda version: version.revision)
        return Folded(best if stored is None or best.revision >= stored.revision else None)

    patch.setattr(revisions, "fold", fold)


def _append_in_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(booking, "needs_rebuild", lambda stored, touch: touch.corrected is not None)


def _pass_what_is_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Window, "offset", lambda self, lane: self._lanes[lane].read_to)
    patch.setattr(Window, "offset_without", lambda self, lane, job_ids: self._lanes[lane].read_to)


TRAPS = [
    Trap(
        "a price reset undone by an advance that counted old snapshots",
        "the key's lock is held from before the prices are read until the watermark is set (sinks/valuation.py)",
        {"value_in_one_transaction": False},
        seed=56,
    ),
    Trap(
        "a reset arriving while the key is being valued",
        "lock first, filter second: no reset looks at a watermark to choose its rows (sinks/resets.py, _RESET)",
        {"lock_first": False},
        world=(("victims", ("valuation-1", "valuation-2")),),
        seed=277,
    ),
    Trap(
        "a valuation with prices older than its claim",
        "prices are read in a statement of their own after the claim (sinks/valuation.py, _WANTED)",
        {"read_prices_after_lock": False},
        world=(("victims", ("valuation-1", "valuation-2")),),
        seed=1194,
    ),
    Trap(
        "a key that never advances",
        "valued_through rises only when a new statement under the security's lock finds no key behind "
        "(sinks/valuation.py, _RAISE)",
        {"raise_only_when_none_is_behind": False},
    ),
    Trap(
        "a trigger dropped when a later date overwrote an earlier one",
        "the pending trigger keeps the earliest date (tables/triggers.py, _merge)",
        {},
        _overwrite_pending,
        seed=60,
    ),
    Trap(
        "a job compacted away before it was read",
        "one job in flight per security; the next is published when that has ended (tables/triggers.py, on_trigger)",
        {},
        _publish_every_trigger,
        seed=24,
    ),
    Trap(
        "a replay that triggers a replay",
        "the same revision again changes nothing (sinks/revisions.py, fold)",
        {},
        _take_equal_revisions,
    ),
    Trap(
        "a later sale keeping its old cost after an earlier purchase arrives",
        "what sorts before the end of the history rebuilds it (sinks/booking.py, needs_rebuild)",
        {},
        _append_in_order_of_arrival,
    ),
    Trap(
        "completing a job of an older epoch",
        "only the end of the job in flight, or of a later one, releases it (tables/triggers.py, on_status)",
        {},
        _any_end_releases,
        (("victims", ("resets", "triggers")), ("read_ahead", False)),
        (("kills", 6), ("zombies", 0), ("compactions", 10), ("stalls", 6)),
        seed=4257,
    ),
    Trap(
        "a zombie's batch applied after its successor's",
        "every transaction compares and swaps offset and claim (sinks/offsets.py, _SWAP)",
        {"fence": False},
        world=(("victims", ("prices-0",)),),
        seed=3426,
    ),
    Trap(
        "a DB deadlock treated as poison",
        "deadlocks are transient and retried in place (sinks/database.py, TRANSIENT)",
        {},
        world=(("deadlock_is_poison", True),),
    ),
    Trap(
        "closing a date while its price is being stored",
        "prices are stored under the calendar's lock, shared; a date is closed under it, exclusive (sinks/calendar.py)",
        {"calendar_lock": False},
        seed=137,
    ),
    Trap(
        "closing an earlier date while a key is being made",
        "transactions are booked under the calendar's lock, shared (sinks/positions.py)",
        {"calendar_lock_when_booking": False},
        world=(("victims", ("business-dates-0", "valuation-1", "valuation-2")),),
        seed=1841,
    ),
    Trap(
        "a late claim by a worker that is no longer the owner",
        "a fenced worker that stays the owner stops, is started again and claims anew (streams/app.py, fenced)",
        {"rejoin": False},
        seed=66,
    ),
    Trap(
        "an offset that passes a job which is not done",
        "the offset moves over the finished prefix of the window only (sinks/window.py, offset)",
        {},
        _pass_what_is_read,
        (("victims", ("resets",)),),
    ),
    Trap(
        "an event that overtakes an earlier one of its key",
        "the relay publishes a key's events by id, each batch after the one before is acknowledged (streams/relay.py)",
        {"publish_in_order": False},
    ),
    Trap(
        "an event that is gone from the outbox before the broker has it",
        "the relay removes what is acknowledged, and nothing else (streams/relay.py, sinks/outbox.py)",
        {"publish_before_delete": False},
        world=(("victims", ("relay",)),),
    ),
]
