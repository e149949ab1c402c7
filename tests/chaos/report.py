"""What a chaos run did and found, as a line, as JSON and as a row of a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_HEAD = (
    "| seed | verdict | brokers | records: dates, prices, transactions, jobs | faults | lag at the faults, least | "
    "samples, audits | corrections, repairs | outbox rows | snapshots | keys downstream | batches fenced | "
    "recovery: kill -9, without restart, Postgres | run |\n" + "|---" * 14 + "|\n"
)


@dataclass
class Injected:
    """One fault. lag: records in Kafka and not yet in Postgres when it came; recovered_in: seconds until every
    partition that had a lag had moved on (from Postgres' return, where that was the fault), None: not measured; alone:
    whether the fault before had been recovered from."""

    kind: str
    what: str
    at: float
    lag: int
    lags: dict[str, int]
    recovered_in: float | None = None
    alone: bool = False


@dataclass
class Report:
    """wrong is empty when every promise was kept."""

    seed: int
    brokers: int = 1
    records: dict[str, int] = field(default_factory=dict)
    faults: list[Injected] = field(default_factory=list)
    seconds: float = 0.0
    healed_in: float = 0.0
    samples: int = 0
    audited: int = 0
    snapshots: int = 0
    keys_compared: int = 0
    fenced: int = 0
    cuts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        """Faults by kind."""
        return Counter(fault.kind for fault in self.faults)

    @property
    def least_lag(self) -> int:
        """The smallest backlog that a fault met."""
        return min((fault.lag for fault in self.faults), default=0)

    def worst_recovery(self, *kinds: str) -> float | None:
        """The longest recovery from faults of these kinds that came alone, in seconds."""
        found = [f.recovered_in for f in self.faults if f.kind in kinds and f.alone and f.recovered_in is not None]
        return max(found, default=None)

    def line(self) -> str:
        """For a log."""
        verdict = "right" if not self.wrong else "WRONG"
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.kinds.items()))
        return (
            f"seed {self.seed}: {verdict}; {sum(self.records.values()):,} records, {len(self.faults)} faults ({faults})"
            f", each at a lag of {self.least_lag:,} or more, {self.samples} samples, {self.audited} securities audited "
            f"meanwhile, {self.snapshots:,} snapshots, {self.fenced} batches fenced, {self.figures}, {self.seconds:.0f}"
            f" s of faults, healed in {self.healed_in:.0f} s"
        )

    def row(self) -> str:
        """Of the table in Markdown."""
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.kinds.items()))
        records = ", ".join(f"{self.records.get(name, 0):,}" for name in _TOPICS)
        recoveries = [self.worst_recovery(kind) for kind in ("kill_worker", "lose_worker", "crash_postgres")]
        cells = [
            self.seed,
            "right" if not self.wrong else f"**WRONG**: {self.wrong[0]}",
            self.brokers,
            records,
            f"{len(self.faults)}: {faults}",
            f"{self.least_lag:,}",
            f"{self.samples}, {self.audited}",
            f"{self.figures.get('corrections', 0):,}, {self.figures.get('repairs', 0)}",
            f"{self.figures.get('outbox_rows', 0):,}",
            f"{self.snapshots:,}",
            f"{self.keys_compared:,}",
            self.fenced,
            ", ".join(map(_seconds, recoveries)),
            f"{self.seconds + self.healed_in:.0f} s",
        ]
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


_TOPICS = ("business-dates", "prices", "transactions", "reprocessing-jobs")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


class Table:
    """Reports by seed in a JSON file; the same as Markdown beside it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._reports: dict[int, Report] = {}
        if file.exists():
            self._reports = {found["seed"]: _report(found) for found in json.loads(file.read_text())}

    def __contains__(self, seed: int) -> bool:
        return seed in self._reports

    @property
    def wrong(self) -> list[int]:
        """Seeds in which a promise was broken."""
        return [report.seed for report in self._reports.values() if report.wrong]

    def add(self, report: Report) -> None:
        """Keep it, at once and whole."""
        self._reports[report.seed] = report
        reports = [self._reports[seed] for seed in sorted(self._reports)]
        _replace(self._file, json.dumps([asdict(r) for r in reports], indent=1) + "\n")
        _replace(self._file.with_suffix(".md"), markdown(reports))


def markdown(reports: Iterable[Report]) -> str:
    """The table."""
    return _HEAD + "\n".join(report.row() for report in reports) + "\n"


def _report(found: dict[str, Any]) -> Report:
    return Report(**{**found, "faults": [Injected(**fault) for fault in found["faults"]]})


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text)
    fresh.replace(file)
