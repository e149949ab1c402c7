"""The API against its own document: whatever the document allows, or forbids, the answer is one that it describes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.topology import Topology
from tests.web.test_api import DOCUMENT
from tests.web.world import TOKEN

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
DEAR = {"/api/lag", "/api/dead-letters", "/api/dead-letters/{partition}/{offset}"}  # each opens a consumer
UNAVAILABLE = 503


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
async def test_the_api_keeps_to_its_document(running: Topology, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    url = running.stack.worker_url("triggers")
    asked: set[tuple[str, str]] = set()
    try:
        for found in schema.get_all_operations():
            operation = found.ok()
            if is_possible(operation, mode):
                await asyncio.to_thread(exercise, operation, mode, url, asked)
    finally:
        await running.pool.execute("update reset_limit set rows_per_second = 10000, paused = false")
    assert len(asked) > 5


def is_possible(operation: Any, mode: GenerationMode) -> bool:
    """An operation without a parameter has nothing that could be wrong."""
    return mode is GenerationMode.POSITIVE or bool(list(operation.iter_parameters())) or bool(operation.body)


def exercise(operation: Any, mode: GenerationMode, url: str, asked: set[tuple[str, str]]) -> None:
    """A few dozen requests."""

    @settings(
        max_examples=4 if operation.path in DEAR else 25,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {TOKEN}", "X-Tidemark-Actor": "schema"})
        asked.add((operation.method, operation.path))
        if response.status_code == UNAVAILABLE:  # as documented; the others are not to be hidden by it
            case.validate_response(response, checks=[status_code_conformance, response_schema_conformance])
        else:
            case.validate_response(response, checks=CHECKS)

    ask()
