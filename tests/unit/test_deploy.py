"""Deployment files: valid, and of the same topology as the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from deploy.local import jars
from streams.settings import ROLES, Settings

ROOT = Path(__file__).parents[2]


def test_the_compose_file_fits_the_compose_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_compose_file_runs_every_role_with_settings_that_exist() -> None:
    services = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]
    commands = [service["command"] for service in services.values() if "command" in service]
    assert commands == [["worker", role] for role in ROLES]
    known = {f"TIDEMARK_{name.upper()}" for name in Settings.model_fields}
    assert set(services["intake"]["environment"]) <= known
    assert services["intake"]["environment"]["TIDEMARK_WEB_TOKEN"].startswith("${TIDEMARK_WEB_TOKEN:?")
    for service in services.values():
        for mount in service.get("volumes", []):
            assert not mount.startswith("./") or (ROOT / mount.split(":")[0]).exists()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_kafkas_jars_are_pinned_by_checksum() -> None:
    checksums = jars.checksums()
    assert len(checksums) == 46
    assert all(len(digest) == 64 for digest in checksums.values())
    assert any(path.endswith(f"kafka_2.13-{jars.KAFKA_VERSION}.jar") for path in checksums)
