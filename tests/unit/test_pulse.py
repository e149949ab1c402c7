"""When a worker counts as standing still."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streams import health
from streams import pulse as pulse_module
from streams.pulse import Pulse


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pulse_module, "time", made)
    return made


def test_a_loop_that_has_stopped_asking_stands_still(clock: Clock) -> None:
    pulse = Pulse(60, lambda: float("inf"))
    asks = {name: pulse.until(lambda: False, name) for name in ("valuation", "relay")}
    assert [ask() for ask in asks.values()] == [False, False]
    for _ in range(4):
        clock.now += 30
        asks["relay"]()
    assert pulse.standing == ["valuation"]
    asks["valuation"]()
    assert pulse.standing == []


def test_what_has_not_begun_or_is_over_is_not_expected_to_go_on(clock: Clock) -> None:
    pulse = Pulse(60, lambda: float("inf"))
    pulse.until(lambda: False, "never asked")
    with pulse.at_work("prices[0]"):
        assert pulse.standing == []
    pulse.beat("gauges")
    pulse.end("gauges")
    clock.now += 1_000
    assert pulse.standing == []


def test_a_piece_of_work_that_does_not_end_stands_still(clock: Clock) -> None:
    pulse = Pulse(60, lambda: float("inf"))
    with pulse.at_work("prices[0]"):
        clock.now += 61
        assert pulse.standing == ["prices[0]"]


@pytest.mark.parametrize(("waited", "standing"), [(0, []), (59, []), (61, ["valuation"])])
def test_waiting_for_the_database_is_no_standstill(clock: Clock, waited: float, standing: list[str]) -> None:
    """Else an outage of Postgres would restart every worker, and mend nothing."""
    pulse = Pulse(60, lambda: waited)
    pulse.beat("valuation")
    clock.now += 1_000
    assert pulse.standing == standing


async def test_healthz_names_the_loop_that_stands_still(clock: Clock) -> None:
    pages: dict[str, Any] = {}
    pulse = Pulse(60, lambda: float("inf"))
    app: Any = SimpleNamespace(role="books", pulse=pulse, page=lambda path: lambda page: pages.update({path: page}))
    health.add_pages(app)
    web = SimpleNamespace(json=lambda content, status: (status, content["standing_still"]))
    pulse.beat("relay")
    assert await pages["/healthz"](web, None) == (200, [])
    clock.now += 61
    assert await pages["/healthz"](web, None) == (503, ["relay"])
