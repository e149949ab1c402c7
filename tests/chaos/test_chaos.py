"""The standing chaos runs: fixed seeds, real processes. `make chaos SEED=… MINUTES=…` runs others, and longer."""

from __future__ import annotations

import pytest

from tests.chaos.faults import FAULTS, choose
from tests.chaos.load import make
from tests.chaos.run import Plan, run

PLANS = {
    1: Plan(4_000, backlog=400, batch_records=100, script=[
        "kill_worker", "cut_at_commit", "silence_postgres", "crash_postgres", "freeze_worker", "fill_disk",
        "kill_broker",
    ]),
    2: Plan(2_000, backlog=200, batch_records=100, brokers=3, script=["kill_broker", "kill_worker"]),
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", PLANS)
async def test_every_promise_is_kept_under_faults(seed: int) -> None:
    plan = PLANS[seed]
    report = await run(seed, plan)
    print(report.line())
    assert report.wrong == [], report.line()
    assert report.kinds.total() == len(plan.script)
    assert report.least_lag >= plan.backlog
    assert report.samples > 20
    assert report.audited > 0
    silenced = [fault for fault in report.faults if fault.kind == "silence_postgres"]
    assert all(fault.recovered_in is not None for fault in silenced), "nothing goes on once new sessions pass"


def test_a_seed_always_means_the_same_load_and_the_same_faults() -> None:
    assert make(7, 500) == make(7, 500)
    assert make(7, 500).records != make(8, 500).records
    assert choose(7, 14) == choose(7, 14) != choose(8, 14)
    assert set(choose(7, 14)) == set(FAULTS)
