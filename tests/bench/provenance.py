"""On what benchmarks ran, kept beside their figures: the machine, what it runs, and the revision that was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from deploy.local import jars, postgres
from tests.bench.peers.run import PEERS, ROOT

_LIBRARIES = ("faust-streaming", "aiokafka", "asyncpg", "msgspec", "rocksdict", "uvloop")
_PEERS = ("quixstreams",)


def provenance() -> dict[str, Any]:
    """Taken before the first round: `load` tells whether something else was running."""
    return {"machine": _machine(), "versions": _versions(), "revision": _revision()}


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """As Linux tells it; elsewhere what Python knows."""
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _versions() -> dict[str, str | None]:
    peers = [str(folder) for folder in PEERS.glob("lib/python*/site-packages")]
    return {
        "python": platform.python_version(),
        "kafka": None if os.environ.get(jars.HOME_VARIABLE) else jars.KAFKA_VERSION,  # an installation tells none
        "postgres": _said(str(postgres.programs() / "postgres"), "--version").rpartition(" ")[2],
        **{name: metadata.version(name) for name in _LIBRARIES},
        **{name: _version_in(peers, name) for name in _PEERS},
    }


def _version_in(folders: list[str], name: str) -> str | None:
    """Of a package in another environment; None where it is not installed."""
    found = metadata.distributions(name=name, path=folders)
    return next((distribution.version for distribution in found), None)


def _revision() -> dict[str, Any] | None:
    """The commit, and whether files have been changed since: the plots that this run replaces do not count."""
    try:
        commit = _said("git", "rev-parse", "HEAD")
        changed = _said("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/plots")
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone
    return {"commit": commit, "changed": bool(changed)}


def _said(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
