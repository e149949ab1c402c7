"""What the plots of a bench.json show, as plain figures: chosen and shaped here, drawn by plots.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

Line = Mapping[str, Any]
"""A result as bench.json has it (tests/bench/harness.py: Result)."""

GROWTH, LATENCY = "growth", "latency"


class NotDrawableError(Exception):
    """The file lacks what a plot needs; the message tells what, in one line."""


@dataclass(frozen=True)
class Bar:
    """How a path does beside its baseline. lowest and highest: of the rounds, each beside the baseline's same round."""

    bench: str
    name: str
    baseline: str
    ratio: float
    lowest: float
    highest: float
    wanted: float | None

    @property
    def reached(self) -> bool:
        """Whether it is what is wanted; without a wish it is."""
        return self.wanted is None or self.ratio >= self.wanted


@dataclass(frozen=True)
class Curve:
    """How the cost of a row grows with the size of something else; ratios: beside the smallest size, round by round."""

    series: str
    axis: str
    unit: str
    sizes: list[int]
    costs: list[float]
    ratios: list[list[float]]
    most: float

    @property
    def medians(self) -> list[float]:
        """Of the costs, beside the smallest size."""
        return [cost / self.costs[0] for cost in self.costs]


@dataclass(frozen=True)
class Stage:
    """A stretch of the way of one late price, milliseconds. begins: when all stages before have taken their median."""

    name: str
    begins: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Stages:
    """The way of one late price: what it was, how many were sent, and the stages in order."""

    series: str
    count: int
    stages: list[Stage]

    @property
    def total(self) -> float:
        """Milliseconds: of the medians."""
        return sum(stage.median for stage in self.stages)


def bars(lines: Sequence[Line]) -> list[Bar]:
    """Every path of which more is better and whose baseline was measured too, in the order of the file."""
    found = [
        _bar(line) for line in lines if line["baseline_rounds"] and not (line["less"] or line["aim"] or line["point"])
    ]
    if not found:
        raise NotDrawableError("no path beside a baseline")
    return found


def curves(lines: Sequence[Line]) -> list[Curve]:
    """One for each series of the benchmark `growth`."""
    return [_curve(series, points) for series, points in _series(lines, GROWTH)]


def stages(lines: Sequence[Line]) -> Stages:
    """The stages that the benchmark `latency` has measured."""
    series, points = _series(lines, LATENCY)[0]
    medians = [statistics.median(line["rounds"]) for line in points]
    begins = [0.0, *accumulate(medians)]
    return Stages(
        series,
        len(points[0]["rounds"]),
        [
            Stage(line["point"]["axis"], begin, median, *_most_of(line["rounds"]))
            for line, begin, median in zip(points, begins, medians, strict=False)
        ],
    )


def provenance(run: Mapping[str, Any]) -> str:
    """Under every plot: on what and when it was measured, and how far it can be trusted."""
    machine, revision = run["machine"], run["revision"]
    parts = [
        "quick: rough figures" if run["quick"] else f"{run['rounds']} rounds",
        f"{machine['cpus']} × {machine['cpu']}",
        f"Postgres {run['versions']['postgres']}, Kafka {run['versions']['kafka'] or '?'}",
        run["at"][:10],
    ]
    if revision:
        parts.append(revision["commit"][:7] + (" with changes" if revision["changed"] else ""))
    return " · ".join(parts)


def _bar(line: Line) -> Bar:
    ratios = _ratios(line)
    return Bar(
        line["bench"], line["name"], line["baseline"], line["ratio"], min(ratios), max(ratios), line["wanted"]
    )  # fmt: skip


def _curve(series: str, points: Sequence[Line]) -> Curve:
    first, *others = points
    return Curve(
        series,
        first["point"]["axis"],
        first["unit"],
        [line["point"]["at"] for line in points],
        [line["median"] for line in points],
        [[1.0] * len(first["rounds"]), *(_ratios(line) for line in others)],
        max(line["wanted"] for line in others),
    )


def _ratios(line: Line) -> list[float]:
    """Of each round: a machine that is slow for a while is slow for both. The ratio of medians lies between them."""
    return [mine / other for mine, other in zip(line["rounds"], line["baseline_rounds"], strict=True)]


def _series(lines: Sequence[Line], bench: str) -> list[tuple[str, list[Line]]]:
    points = [line for line in lines if line["bench"] == bench and line["point"]]
    if not points:
        raise NotDrawableError(f"no results of the benchmark `{bench}`")
    return [(name, list(found)) for name, found in groupby(points, lambda line: line["point"]["series"])]


def _most_of(values: Sequence[float]) -> tuple[float, float]:
    """Between what eight tenths of the values lie; of too few all of them."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return ordered[cut], ordered[-1 - cut]
