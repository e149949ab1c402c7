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
    """Run all mutants; exits with 1 when too many survive."""
    shutil.rmtree("mutants", ignore_errors=True)
    subprocess.run([_MUTMUT, "run", "--max-children", str(os.cpu_count() or 1)], check=True)
    listed = subprocess.run([_MUTMUT, "results", "--all", "true"], check=True, capture_output=True, text=True).stdout
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for line in listed.splitlines():
        name, _, outcome = line.strip().rpartition(": ")
        module = name.partition(".x")[0]
        outcomes[module][outcome] += 1
        if outcome in ("survived", "no tests"):
            survivors.append(name)
    for module, counts in sorted(outcomes.items()):
        print(f"{module:<20} {_share(counts):6.1%} killed  {dict(counts)}")
    print("\n".join(f"survived: {name}" for name in survivors))
    total = sum(outcomes.values(), Counter[str]())
    print(f"{_share(total):.1%} of {_judged(total)} killed; `mutmut show NAME` shows a survivor")
    sys.exit(_share(total) < _WANTED)


def _judged(counts: Counter[str]) -> int:
    return sum(count for outcome, count in counts.items() if outcome != "skipped")


def _share(counts: Counter[str]) -> float:
    killed = sum(counts[outcome] for outcome in ("killed", "timeout", "segfault", "caught by type check"))
    return killed / (_judged(counts) or 1)


if __name__ == "__main__":
    main()
