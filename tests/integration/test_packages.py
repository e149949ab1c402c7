"""The wheel and the sdist: complete, and the same whichever way they are built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tidemark", "streams", "tables", "sinks", "deploy")
NOT_SHIPPED = {".pyc", ".yaml", ".yml", ".env"}  # of deploy/: what people take from the repository


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, built from a copy of what is tracked, so that nothing else can slip in."""
    folder = tmp_path_factory.mktemp("packages")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def shipped() -> set[str]:
    """What the code needs at run time: every module, and every file beside them that is read."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {Path(name) for name in listed.splitlines() if (ROOT / name).is_file()}
    modules = {file.parent for file in files if file.name == "__init__.py"}
    beside = {"templates", "static"}
    return {
        str(file)
        for file in files
        if (file.parent in modules or (file.parent.name in beside and file.parent.parent in modules))
        and file.suffix not in NOT_SHIPPED
        and file.name not in ("Dockerfile", "requirements.lock")
    }


def test_the_wheel_has_every_module_and_what_they_read(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert shipped() - found == set()
    assert not any(name.startswith("tests/") for name in found)
    assert "Requires-Python: >=3.11" in text
    for extra in ("local", "otel", "dev"):
        assert f"Provides-Extra: {extra}" in text
    assert licences


def test_the_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(tmp_path / "again"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / "again" / wheel.name) as other:
        contents = [
            {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
            for archive in (one, other)
        ]
    assert contents[0] == contents[1]


def test_the_installed_wheel_starts_in_an_empty_directory(dist: Path, tmp_path: Path) -> None:
    """With the libraries that are here, but not from the clone."""
    (wheel,) = dist.glob("*.whl")
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = "import tidemark.main as m, streams.web.console as page; print(page.__file__); m.main(['demo', '--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    assert "Usage:" in done.stdout
