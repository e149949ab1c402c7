"""What benchmarks are run with: rounds in turn, a line for each baseline, and on what they ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import provenance
from tests.bench.harness import Bench, Work


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, quick=False, rounds=2, say=lambda step: None)


@pytest.fixture
def ran() -> list[str]:
    """What has run, in order."""
    return []


def work(name: str, ran: list[str]) -> Work:
    async def once() -> float:
        ran.append(name)
        return float(len(ran))

    return once


async def test_subject_and_baseline_run_in_turn(bench: Bench, ran: list[str]) -> None:
    async with bench.running("some"):
        await bench.compare("path", "1/s", work("path", ran), ("plain", work("plain", ran)), wanted=0.5, rounds=3)
        await bench.compare("alone", "1/s", work("alone", ran))
    assert ran == ["plain", "path"] * 3 + ["alone"] * 2
    with_baseline, alone = bench.results
    assert (with_baseline.rounds, with_baseline.baseline_rounds, with_baseline.ratio) == ([2, 4, 6], [1, 3, 5], 4 / 3)
    assert (alone.baseline, alone.ratio, alone.bench) == (None, None, "some")


async def test_a_path_runs_once_a_round_for_all_it_stands_beside(bench: Bench, ran: list[str]) -> None:
    baselines = [("a", work("a", ran), 2.0), ("b", work("b", ran), 3.0)]
    await bench.compare_with_each("path", "1/s", work("path", ran), baselines)
    assert ran == ["a", "b", "path"] * 2
    assert [(line.baseline, line.wanted) for line in bench.results] == [("a", 2), ("b", 3)]
    assert [(line.rounds, line.baseline_rounds) for line in bench.results] == [([3, 6], [1, 4]), ([3, 6], [2, 5])]


def test_the_processor_is_told_where_linux_tells_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A Processor @ 1 GHz\n\nprocessor\t: 1\nmodel name\t: Another\n")
    assert provenance._cpu_model(file) == "A Processor @ 1 GHz"
    assert isinstance(provenance._cpu_model(tmp_path / "none"), str)


def test_a_run_says_on_what_it_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = provenance.provenance()
    assert {"cpu", "cpus", "memory_gib", "load", "system", "machine"} == found["machine"].keys()
    assert {"python", "kafka", "postgres", "faust-streaming", "quixstreams"} < found["versions"].keys()
    assert found["versions"]["postgres"].startswith("18.")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.provenance()["revision"] is None, "not a clone"
