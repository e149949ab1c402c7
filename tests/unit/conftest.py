"""How thorough the properties are where they run for hundreds of mutants; and what `make mutants` needs of pytest."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("mutants", max_examples=15, deadline=None, database=None, derandomize=True)

if not hasattr(
    pytest.Item, "_nodeid"
):  # mutmut asks for it; newer versions of mutmut, which do not, need a newer click
    pytest.Item._nodeid = property(lambda item: item.nodeid)  # type: ignore[attr-defined]
