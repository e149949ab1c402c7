"""`make mutants`: mutmut on the pure parts, judged: at least 85 % killed, and the survivors listed.

What is mutated and which tests must notice stands in pyproject.toml ([tool.mutmut]).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

_WANTED = 0.85
_MUTMUT = Path(sys.executable).with_name("mutmut")


def main() -> None:
    """Run all mutants, and what survives once more by name; exits with 1 when too many survive."""
    shutil.rmtree("mutants", ignore_errors=True)
    _run()
    first = _survivors(_results())
    if first:  # the first pass over many mutants misses kills that a run by name sees
        _run(*first)
    results = _results()
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in results.items():
        by_module[name.partition(".x")[0]][outcome] += 1
    for module, counts in sorted(by_module.items()):
        print(f"{module:<20} {_share(counts):6.1%} killed  {dict(counts)}")
    print("\n".join(f"survived: {name}" for name in _survivors(results)))
    total = Counter(results.values())
    print(f"{len(first)} survived the first pass")
    print(f"{_share(total):.1%} of {_judged(total)} killed; `mutmut show NAME` shows a survivor")
    sys.exit(_share(total) < _WANTED)


def _run(*names: str) -> None:
    subprocess.run([_MUTMUT, "run", "--max-children", str(os.cpu_count() or 1), *names], check=True)


def _results() -> dict[str, str]:
    listed = subprocess.run([_MUTMUT, "results", "--all", "true"], check=True, capture_output=True, text=True).stdout
    lines = (line.strip().rpartition(": ") for line in listed.splitlines())
    return {name: outcome for name, _, outcome in lines if name}


def _survivors(results: dict[str, str]) -> list[str]:
    return [name for name, outcome in results.items() if outcome in ("survived", "no tests")]


def _judged(counts: Counter[str]) -> int:
    return sum(count for outcome, count in counts.items() if outcome != "skipped")


def _share(counts: Counter[str]) -> float:
    killed = sum(counts[outcome] for outcome in ("killed", "timeout", "segfault", "caught by type check"))
    return killed / (_judged(counts) or 1)


if __name__ == "__main__":
    main()
