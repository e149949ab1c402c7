"""What Tidemark is made of: locked, under licences that let it be used, listed, without known holes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE, CLONE = ROOT / "deploy" / "requirements.lock", ROOT / "requirements.lock"
_PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)")
_PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|Zlib|Repoze Public|"
    r"Mozilla Public License 2.0|MPL-2.0",  # of a file that is not changed: fine
)
_COPYLEFT = re.compile(r"\b(A?GPL|GNU (Affero )?General)", re.I)


def pins(lock: Path) -> dict[str, str]:
    found = [match.groups() for line in lock.read_text().splitlines() if (match := _PIN.match(line))]
    return dict(found)


def tool(name: str, *arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("lock", [IMAGE, CLONE], ids=["image", "clone"])
def test_everything_is_pinned_by_its_hash(lock: Path) -> None:
    requirements = re.split(r"\n(?=[a-z0-9])", lock.read_text().strip())
    assert len(requirements) > 50
    assert all(_PIN.match(requirement) and "--hash=sha256:" in requirement for requirement in requirements)
    assert "://" not in lock.read_text()


def test_the_image_has_what_was_tested() -> None:
    assert pins(IMAGE).items() <= pins(CLONE).items()


def test_licences_let_it_be_used_and_passed_on() -> None:
    listed = tool("pip-licenses", "--format", "json", "--from", "mixed")
    assert listed.returncode == 0, listed.stderr
    known = {row["Name"].lower().replace("_", "-"): row["License"] for row in json.loads(listed.stdout)}
    installed = {name: known[name] for name in pins(IMAGE) if name in known}  # some are for other systems
    assert len(installed) > 50
    wrong = {n: text for n, text in installed.items() if not _PERMISSIVE.search(text) or _COPYLEFT.search(text)}
    assert wrong == {}


def test_the_list_of_parts_is_complete(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    done = tool("cyclonedx-py", "requirements", IMAGE, "--pyproject", ROOT / "pyproject.toml", "-o", made)
    assert done.returncode == 0, done.stderr
    bom = json.loads(made.read_text())
    assert bom["metadata"]["component"]["name"] == "tidemark"
    assert {part["name"]: part["version"] for part in bom["components"]} == pins(IMAGE)


def test_no_part_has_a_known_hole() -> None:
    done = tool("pip-audit", "-r", IMAGE, "--require-hashes", "--disable-pip", "--format", "json", timeout=240)
    try:
        parts = json.loads(done.stdout)["dependencies"]
    except ValueError:
        pytest.skip(f"NOT AUDITED, no advisories can be had: {done.stderr.strip().splitlines()[-1:]}")
    audited = [part for part in parts if "skip_reason" not in part]
    if not audited:
        pytest.skip(f"NOT AUDITED, no advisories can be had: {parts[0]['skip_reason']}")
    assert {part["name"]: [hole["id"] for hole in part["vulns"]] for part in audited if part["vulns"]} == {}
