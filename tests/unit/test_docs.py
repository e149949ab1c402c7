"""The documentation builds as a site without a warning: every link leads somewhere, every page can be found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
_LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(https?:[^"'\s>]+)|<link[^>]*rel=["']?stylesheet[^>]*(https?:[^"'\s>]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    def pages(part: object) -> set[str]:
        if isinstance(part, str):
            return {part}
        return set().union(*(pages(each) for each in (part.values() if isinstance(part, dict) else part)))  # type: ignore[attr-defined]

    named = pages(YAML(typ="safe").load(ROOT / "mkdocs.yml")["nav"])
    written = {file.name for file in (ROOT / "docs").glob("*.md")}
    assert written == {name for name in named if not name.startswith("reference/")}
    assert {path.name for path in (site / "reference").iterdir()} == {"commands", "settings", "topics", "tables", "api"}


def test_the_reference_has_what_the_code_has(site: Path) -> None:
    found = {path.parent.name: path.read_text() for path in (site / "reference").glob("*/index.html")}
    assert "TIDEMARK_SASL_OAUTH_TOKEN_URL" in found["settings"]
    assert "tidemark jobs prioritise" in found["commands"]
    assert "tidemark-triggers-triggers-changelog" in found["topics"]
    assert "0008 backlog" in found["tables"]
    assert "/api/dead-letters" in found["api"]


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert {page.name: found for page in pages if (found := _LOADED.findall(page.read_text()))} == {}


def test_what_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
