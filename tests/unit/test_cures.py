"""The list of `make cures` is true: each cure is where it says, and its tests exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cures import CURES, Cure, taken_out

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cure", CURES, ids=lambda cure: cure.name)
def test_each_cure_is_in_its_file_and_leaves_python_behind(cure: Cure) -> None:
    rest = taken_out(cure, (ROOT / cure.file).read_text())
    compile(rest, cure.file, "exec")
    assert (ROOT / cure.words[0]).is_file()
