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
_ROUNDING_MIB = 8.0


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
            figures: dict[str, Any] = {"memory_level": True}
            for kind in ("memory", "disk"):
                early = [r[kind] for r in of_name if r[kind] is not None and warm <= r["seconds"] < warm + third]
                late = [r[kind] for r in of_name if r[kind] is not None and r["seconds"] >= seconds - third]
                if early and late:
                    first, last = statistics.median(early), statistics.median(late)
                    per_hour = (last - first) / (2 * third) * 3600
                    figures |= {f"{kind}_early": first, f"{kind}_late": last, f"{kind}_per_hour": per_hour}
                    if kind == "memory":
                        figures["memory_level"] = last <= first * _TOLERANCE + _ROUNDING_MIB
            if len(figures) > 1:
                judged[name] = figures
        return judged


def verdict(report: dict[str, Any]) -> Table:
    """The figures of every process as a table."""
    table = Table("process", "MiB early", "MiB late", "level", "disk MiB early", "disk MiB late", "disk MiB per hour")
    for name, figures in report["processes"].items():
        level = ("yes" if figures["memory_level"] else "no") if "memory_late" in figures else "-"
        names = ("memory_early", "memory_late", "disk_early", "disk_late", "disk_per_hour")
        cells = [f"{figures[n]:,.1f}" if n in figures else "-" for n in names]
        table.add_row(name, *cells[:2], level, *cells[2:])
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
    try:
        if entry.is_file():
            return entry.stat().st_size
        return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
    except OSError:
        return 0
