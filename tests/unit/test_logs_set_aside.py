"""A log that grows too large while a process writes to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import process


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(process, "_LOG_LIMIT", 1_000)
    return tmp_path / "worker.log"


def test_a_small_log_stays_and_no_log_is_no_error(log: Path) -> None:
    process.set_large_log_aside(log)
    log.write_bytes(b"x" * 1_000)
    process.set_large_log_aside(log)
    assert log.stat().st_size == 1_000
    assert not log.with_suffix(".log.1").exists()


def test_a_process_goes_on_writing_at_the_beginning_of_the_emptied_log(log: Path) -> None:
    program = "import sys; print('a' * 2000, flush=True); sys.stdin.read(1); print('after', flush=True)"
    with log.open("ab") as output:
        writer = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )
    while log.stat().st_size < 2_001:
        assert writer.poll() is None
    process.set_large_log_aside(log)
    assert log.with_suffix(".log.1").read_text() == "a" * 2_000 + "\n"
    writer.communicate(b"x")
    assert log.read_text() == "after\n"
