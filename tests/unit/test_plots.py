"""What the benchmarks' plots show, without drawing it; and drawn, where matplotlib is at hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.bench import plots
from tests.bench.figures import NotDrawableError, bars, curves, provenance, stages
from tests.bench.harness import Bench, Point, Result, as_json
from tests.bench.peers.run import PEERS_PYTHON, ROOT

_NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}

BEGUN: dict[str, Any] = {
    "at": "2025-03-04T05:06:07+00:00",
    "machine": {"cpu": "A Processor", "cpus": 2},
    "versions": {"postgres": "18.1", "kafka": "4.1.1"},
    "revision": {"commit": "0123456789abcdef", "changed": False},
}


@pytest.fixture
async def run(tmp_path: Path) -> dict[str, Any]:
    """A run as the harness writes it."""
    bench = Bench(tmp_path, quick=False, rounds=3, say=lambda step: None)
    late = "one late price"
    measured = {
        "relay": [
            Result("queued", "1/s", [8.0, 10.0, 12.0], "bare", [10.0, 10.0, 20.0], 0.5),
            Result("rate", "1/s", [99.0], "set", [100.0], 1.0, aim=True),
            Result("idle", "ms", [3.0], less=True),
        ],
        "growth": [
            Result(f"{n}", "µs", rounds, *beside, less=True, point=Point("append", "rows", n))
            for n, rounds, beside in (
                (10, [20.0, 40.0, 30.0], ()),
                (1_000, [30.0, 44.0, 33.0], ("10", [20.0, 40.0, 30.0], 1.5)),
            )
        ],
        "latency": [
            Result("p50", "ms", [35.0], "no Kafka", [30.0], less=True),
            *(
                Result(what, "ms", times, less=True, point=Point(late, what, number))
                for number, (what, times) in enumerate([("sent", [1.0, 2.0, 9.0]), ("right", [30.0, 31.0, 32.0])], 1)
            ),
        ],
    }
    for name, lines in measured.items():
        async with bench.running(name):
            for line in lines:
                bench.add(line)
    return json.loads(json.dumps(as_json(bench, BEGUN)))


def test_the_file_has_every_round_and_where_it_was_measured(run: dict[str, Any]) -> None:
    first = run["results"][0]
    assert (first["bench"], first["rounds"], first["baseline_rounds"]) == ("relay", [8, 10, 12], [10, 10, 20])
    assert run["seconds"].keys() == {"relay", "growth", "latency"}
    assert (run["quick"], run["rounds"]) == (False, 3)
    assert {name: run[name] for name in BEGUN} == BEGUN


def test_bars_are_paths_of_which_more_is_better_beside_what_was_measured_too(run: dict[str, Any]) -> None:
    (bar,) = bars(run["results"])
    assert (bar.bench, bar.name, bar.baseline) == ("relay", "queued", "bare")
    assert (bar.lowest, bar.ratio, bar.highest) == (0.6, 1.0, 1.0)  # 0.8, 1.0, 0.6 round by round; of the medians 1
    assert bar.reached
    run["results"][0] |= {"wanted": 1.1}
    assert not bars(run["results"])[0].reached


def test_curves_are_ratios_to_the_smallest_size(run: dict[str, Any]) -> None:
    (curve,) = curves(run["results"])
    assert (curve.series, curve.axis, curve.unit, curve.most) == ("append", "rows", "µs", 1.5)
    assert (curve.sizes, curve.costs, curve.medians) == ([10, 1_000], [30, 33], [1, 1.1])
    assert curve.ratios == [[1, 1, 1], pytest.approx([1.5, 1.1, 1.1])]


def test_a_stage_begins_where_the_one_before_has_ended(run: dict[str, Any]) -> None:
    shown = stages(run["results"])
    assert (shown.series, shown.count, shown.total) == ("one late price", 3, 33)
    assert [(stage.name, stage.begins, stage.median) for stage in shown.stages] == [("sent", 0, 2), ("right", 2, 31)]
    assert (shown.stages[0].low, shown.stages[0].high) == (1, 9)
    run["results"][-1]["rounds"] = [float(n) for n in range(100)]
    assert (stages(run["results"]).stages[1].low, stages(run["results"]).stages[1].high) == (10, 89)


def test_what_is_missing_is_named(run: dict[str, Any]) -> None:
    for missing, shape in (("growth", curves), ("latency", stages)):
        with pytest.raises(NotDrawableError, match=f"no results of the benchmark `{missing}`"):
            shape([line for line in run["results"] if line["bench"] != missing])
    with pytest.raises(NotDrawableError, match="no path beside a baseline"):
        bars([])


def test_quick_figures_and_changed_files_do_not_pass_for_others(run: dict[str, Any]) -> None:
    assert provenance(run) == "3 rounds · 2 × A Processor · Postgres 18.1, Kafka 4.1.1 · 2025-03-04 · 0123456"
    rough = provenance({**run, "quick": True, "revision": {**run["revision"], "changed": True}})
    assert rough.startswith("quick: rough figures · ")
    assert rough.endswith("0123456 with changes")
    assert provenance({**run, "revision": None}).endswith("2025-03-04")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file or directory: `make bench` writes it"),
        ("{", "not written by `make bench`"),
        ("{}", "not written by `make bench`"),
        ('{"results": []}', "no path beside a baseline: run `make bench` for all of them"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused_in_one_line(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    done = CliRunner().invoke(plots.main, [str(file), str(tmp_path / "plots")])
    assert done.exit_code == 1
    assert (done.output.count("\n"), told in done.output) == (1, True), done.output
    assert not (tmp_path / "plots").exists()


def drawing_python() -> str:
    """An interpreter that has matplotlib: this one, or that of `make peers`."""
    for python in filter(Path.exists, (Path(sys.executable), PEERS_PYTHON)):
        if subprocess.run([python, "-c", "import matplotlib"], capture_output=True).returncode == 0:
            return str(python)
    pytest.skip("NOT DRAWN: matplotlib is in the environment of `make peers` only")


def test_the_same_file_gives_the_same_pictures_which_load_nothing(run: dict[str, Any], tmp_path: Path) -> None:
    python, file = drawing_python(), tmp_path / "bench.json"
    file.write_text(json.dumps(run))
    for folder in ("once", "again"):
        command = [python, "-m", "tests.bench.plots", str(file), str(tmp_path / folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_text() for path in (tmp_path / "once").iterdir()}
    assert drawn == {path.name: path.read_text() for path in (tmp_path / "again").iterdir()}
    assert sorted(drawn) == ["growth.svg", "late-price.svg", "ratios.svg"]
    for svg in drawn.values():
        assert svg.startswith('<svg role="img" aria-label="')
        assert len(svg) < 100_000
        assert re.findall(r"""(?:href|src)=["'](?!#)[^"']*|@import|url\((?!#)|<!DOCTYPE""", svg) == []
        assert set(re.findall(r"https?://[^\s\"'<]+", svg)) <= _NAMESPACES
