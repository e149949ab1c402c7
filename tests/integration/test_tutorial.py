"""The tutorial's commands, run in order as a reader would; what a page says is printed is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LONGEST_SECONDS = 120.0


def steps(page: str) -> list[tuple[str, list[str]]]:
    """(commands, lines that they print) in order; no lines where the page shows none."""
    found = re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, re.DOTALL)
    return [(commands, [" ".join(line.split()) for line in printed.splitlines()]) for commands, printed in found]


def test_the_tutorial_does_what_it_says(folder: Path) -> None:
    place = folder / "tutorial"
    place.mkdir()
    page = (ROOT / "docs" / "tutorial.md").read_text()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "TIDEMARK_DATA_DIR"}
    environment = kept | {"PATH": path, "PYTHONPATH": str(ROOT)}
    exports = ""
    try:
        for commands, expected in steps(page):
            exports += "".join(re.findall(r"^export .*\n", commands, re.MULTILINE)).replace("=6066", "=0")
            script = re.sub(r"^export .*\n", "", commands, flags=re.MULTILINE)
            deadline = time.monotonic() + _LONGEST_SECONDS
            while missing := run(exports + script, expected, place, environment):  # the books follow in a moment
                assert time.monotonic() < deadline, f"{script}does not print {missing}"
                time.sleep(0.2)
    finally:
        run(exports + "tidemark down\n", [], place, environment)


def run(script: str, expected: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """Which of the lines are missing in what the script prints; it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return [line for line in expected if line not in printed]
