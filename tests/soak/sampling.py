"""Memory and disk of every process of a stack, sampled; whether they are level."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

_MIB = 1024 * 1024
_WARM_SECONDS = 600.0
_TOLERANCE = 1.1  # the last third of the time after the warm-up against its first third
_ROUNDING_MIB = {"memory": 8.0, "disk": 48.0}  # disk: three segments of Postgres' log, which come and go


class Samples:
    """Rows of (seconds, name, MiB of memory, MiB of disk); names are the same after a restart."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._folder = folder

    def take(self, seconds: float, workers: Mapping[int | None, str]) -> None:
        """One sample of everything. workers: roles by process id."""
        memory: dict[str, float] = defaultdict(float)
        for process in psutil.Process().children(recursive=True):
            try:
                memory[workers.get(process.pid) or _name(process)] += _unique(process) / _MIB
            except psutil.Error:
                continue
        disk = {entry.name: _size(entry) / _MIB for entry in self._folder.iterdir() if entry.is_dir()}
        for name in sorted({*memory, *disk}):
            self.rows.append({"seconds": seconds, "name": name, "memory": memory.get(name), "disk": disk.get(name)})

    def judge(self, seconds: float) -> dict[str, dict[str, Any]]:
        """By name: memory and disk in the first and the last third after the warm-up, and their growth by the hour."""
        warm = min(_WARM_SECONDS, seconds / 6)
        third = (seconds - warm) / 3
        judged: dict[str, dict[str, Any]] = {}
        for name in sorted({row["name"] for row in self.rows}):
            of_name = [row for row in self.rows if row["name"] == name]
            figures: dict[str, Any] = {"memory_level": True, "disk_level": True}
            for kind in ("memory", "disk"):
                early = [r[kind] for r in of_name if r[kind] is not None and warm <= r["seconds"] < warm + third]
                late = [r[kind] for r in of_name if r[kind] is not None and r["seconds"] >= seconds - third]
                if early and late:
                    first, last = statistics.median(early), statistics.median(late)
                    per_hour = (last - first) / (2 * third) * 3600
                    figures |= {f"{kind}_early": first, f"{kind}_late": last, f"{kind}_per_hour": per_hour}
                    figures[f"{kind}_level"] = last <= first * _TOLERANCE + _ROUNDING_MIB[kind]
            if len(figures) > 2:
                judged[name] = figures
        return judged


def verdict(report: dict[str, Any]) -> Table:
    """The figures of every process as a table."""
    table = Table("process", *(f"{kind} {what}" for kind in ("memory", "disk") for what in ("early", "late", "level")))
    for name, figures in report["processes"].items():
        cells: list[str] = []
        for kind in ("memory", "disk"):
            known = f"{kind}_late" in figures
            cells += [f"{figures[f'{kind}_{when}']:,.1f}" if known else "-" for when in ("early", "late")]
            cells.append(("yes" if figures[f"{kind}_level"] else "no") if known else "-")
        table.add_row(name, *cells)
    table.caption = "MiB, medians of the first and the last third after the warm-up"
    return table


def _name(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for name, mark in (("auditor", "tidemark.audit.background"), ("kafka", "java"), ("postgres", "postgres")):
        if mark in line:
            return name
    return "other"


def _unique(process: psutil.Process) -> int:
    """Memory that is its own: shared buffers would count once per session of Postgres."""
    unique: int = process.memory_full_info().uss
    return unique


def _size(entry: Path) -> int:
    """What the disk holds of it: Kafka's index files are longer than they are large."""
    total = 0
    for path in (entry, *entry.rglob("*")):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue
    return total
