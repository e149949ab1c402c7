"""The standing chaos run: fixed seeds, real processes. `make chaos SEED=… MINUTES=…` runs others, and longer."""

from __future__ import annotations

import pytest

from tests.chaos.run import run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [3, 13])
async def test_every_promise_is_kept_under_faults(seed: int) -> None:
    report = await run(seed, seconds=30, records=12_000)
    print(report.line())
    assert report.wrong == [], report.line()
    assert report.samples > 50
    assert sum(report.faults.values()) >= 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sabotage", ["no_fence", "offset_first"])
async def test_the_run_notices_when_a_protection_is_missing(sabotage: str) -> None:
    report = await run(3, seconds=20, records=12_000, sabotage=sabotage)
    assert report.wrong != []
