"""`tidemark up`, `status`, `down`: the local stack as an operator meets it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.local import state

_TIDEMARK = [sys.executable, "-m", "tidemark"]


def tidemark(*arguments: str, data_dir: Path, stdin: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMARK_")}
    named = {f"TIDEMARK_{name.upper()}": str(value) for name, value in settings.items()}
    kept = {name: os.environ[name] for name in ("TIDEMARK_MAVEN_URL", "TIDEMARK_KAFKA_HOME") if name in os.environ}
    return subprocess.run(
        [*_TIDEMARK, *arguments],
        env={**clean, **kept, **named, "TIDEMARK_DATA_DIR": str(data_dir)},
        input=stdin, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def status(data_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tidemark("status", "--json", data_dir=data_dir).stdout)
    return found


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("starting: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.1)


@pytest.fixture
def data_dir(folder: Path, request: pytest.FixtureRequest) -> Any:
    path = folder / f"stack-{request.node.name}"
    yield path
    state.shut_down(path, 60)


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_broken_setting_is_one_line(data_dir: Path, detach: list[str]) -> None:
    assert_one_line(tidemark("up", *detach, data_dir=data_dir, web_port="many"), "TIDEMARK_WEB_PORT", "many")
    assert_one_line(tidemark("up", *detach, data_dir=data_dir, broker_url="localhost"), "TIDEMARK_BROKER_URL")


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_an_occupied_data_directory_is_one_line(data_dir: Path, detach: list[str]) -> None:
    lock = state.DataDirLock(data_dir)
    lock.acquire()
    try:
        assert_one_line(tidemark("up", *detach, data_dir=data_dir), "already runs", str(data_dir))
    finally:
        lock.release()


def test_a_data_directory_that_cannot_be_made_is_one_line(folder: Path) -> None:
    file = folder / "file"
    file.write_text("")
    assert_one_line(tidemark("up", data_dir=file / "stack"), "TIDEMARK_DATA_DIR")
    assert_one_line(tidemark("up", "--detach", data_dir=file / "stack"), "TIDEMARK_DATA_DIR")


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_an_unreachable_broker_or_database_is_one_line(
    data_dir: Path, empty_database: str, kafka: str, detach: list[str]
) -> None:
    nowhere = "127.0.0.1:1"
    broker = tidemark("up", *detach, data_dir=data_dir, broker_url=f"kafka://{nowhere}", database_url=empty_database)
    assert_one_line(broker, "broker", nowhere)
    database = tidemark(
        "up", *detach, data_dir=data_dir, broker_url=kafka, database_url=f"postgresql://nobody@{nowhere}/none"
    )
    assert_one_line(database, "database")


def test_nothing_runs(data_dir: Path) -> None:
    assert_one_line(tidemark("status", data_dir=data_dir), "no local stack")
    assert status(data_dir) == {
        "broker_url": None, "database_url": None, "web_url": None, "ready": False, "workers": [], "books": None,
    }  # fmt: skip
    assert tidemark("down", data_dir=data_dir).returncode == 0
    for command in (["migrate"], ["topics"], ["worker", "books"], ["audit"], ["produce", "prices", "-"]):
        assert_one_line(tidemark(*command, data_dir=data_dir), "tidemark up")


def test_a_bad_file_sends_nothing(data_dir: Path, kafka: str) -> None:
    text = '{"security_id": "S", "price_date": "2025-01-01", "price": 1}\n{"security_id": "S"}\n'
    result = tidemark("produce", "prices", "-", data_dir=data_dir, stdin=text, broker_url=kafka)
    assert result.returncode != 0
    assert "-:2: invalid: " in result.stderr
    assert "1 of 2 records are bad; nothing was sent" in result.stderr


def test_two_stacks_live_side_by_side_survive_deaths_and_keep_their_data(data_dir: Path, folder: Path) -> None:
    other = folder / "stack-other"
    try:
        for path in (data_dir, other):
            result = tidemark("up", "--detach", data_dir=path)
            assert result.returncode == 0, result.stderr
        first, second = status(data_dir), status(other)
        assert first["ready"]
        assert second["ready"]
        assert first["broker_url"] != second["broker_url"]
        assert first["database_url"] != second["database_url"]
        assert {worker["role"] for worker in first["workers"]} == {"intake", "triggers", "resets", "books"}
        _only_loopback(data_dir)
        csv = "security_id,price_date,price\nS,2025-01-01,10.50\n"
        sent = tidemark("produce", "prices", "-", "--format", "csv", data_dir=data_dir, stdin=csv)
        assert sent.stdout == "1 records sent to prices\n"
        wait_until(lambda: _prices(first["database_url"]) == 1)

        victim = next(worker for worker in first["workers"] if worker["role"] == "intake")
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: (now := status(data_dir))["ready"] and _pid(now, "intake") != victim["pid"])

        pids = _pids(data_dir)
        assert tidemark("down", data_dir=data_dir).stdout == "stopped\n"
        assert [pid for pid in pids if _runs(pid)] == []
        assert status(other)["ready"]

        supervisor, *rest = _pids(other)
        os.kill(supervisor, signal.SIGKILL)  # nobody is left to stop the others
        wait_until(lambda: not any(_runs(pid) for pid in rest))
        assert tidemark("up", "--detach", data_dir=other).returncode == 0

        assert tidemark("up", "--detach", data_dir=data_dir).returncode == 0
        again = status(data_dir)
        assert again["database_url"] == first["database_url"]
        assert _prices(again["database_url"]) == 1
    finally:
        state.shut_down(other, 60)


def _prices(database_url: str) -> int:
    from sinks.database import connect

    async def count() -> int:
        connection = await connect(database_url)
        try:
            return int(await connection.fetchval("select count(*) from market_prices"))
        finally:
            await connection.close()

    return asyncio.run(count())


def _pid(found: dict[str, Any], role: str) -> int | None:
    return next((worker["pid"] for worker in found["workers"] if worker["role"] == role), None)


def _pids(data_dir: Path) -> list[int]:
    found = state.read(data_dir)
    assert found is not None
    return [found.supervisor.pid, *(process.pid for process in found.processes)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _only_loopback(data_dir: Path) -> None:
    for pid in _pids(data_dir):
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1"), connection
