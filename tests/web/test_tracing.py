"""A correction as one trace, through four workers and Kafka, as a collector receives it."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy.local.postgres import PostgresServer
from streams import tracing
from streams.settings import load_named
from tests.topology import run_topology
from tests.web.world import DAYS, price, trade, until

ROLES = {"tidemark-intake", "tidemark-triggers", "tidemark-resets", "tidemark-books"}


class Collector:
    """Keeps the spans that workers send, with the name of the service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return web.Response()

    def of(self, trace_id: bytes) -> list[tuple[str, Any]]:
        return [(service, span) for service, span in self.spans if span.trace_id == trace_id]


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    found = Collector()
    application = web.Application()
    application.router.add_post("/v1/traces", found.receive)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    yield found
    await runner.cleanup()


def about(span: Any) -> dict[str, Any]:
    values = {a.key.removeprefix("tidemark."): a.value for a in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


async def test_a_correction_is_one_trace(
    kafka: str, postgres: PostgresServer, folder: Path, collector: Collector
) -> None:
    dsn = await postgres.create_database(f"traced_{uuid.uuid4().hex[:8]}")
    async with run_topology(kafka, dsn, folder) as running:
        await running.send([("business-dates", {"business_date": day}) for day in DAYS])
        await running.send([price("S", 1, 10), *(trade(f"P{n}", "S", 1, 5, 1) for n in range(3))])
        await running.settle()
        await running.send([price("S", 4, 12)])
        await running.settle()
        late = await running.pool.fetchrow("select * from corrections where reason = 'price' order by seq desc limit 1")

        async def whole() -> Any:
            roots = [s for _, s in collector.spans if s.name == "correction" and about(s)["seq"] == late["seq"]]
            return roots and {service for service, _ in collector.of(roots[0].trace_id)} == ROLES and roots[0]

        root = await until(whole, "a root, and a span of every role")
        spans = collector.of(root.trace_id)
        by_name: dict[str, list[Any]] = {}
        for _, span in spans:
            by_name.setdefault(span.name, []).append(span)
        assert by_name.keys() == {"correction", "issue", "decide", "reset", "value"}
        assert all(span.parent_span_id == root.span_id for _, span in spans if span is not root)
        assert not root.parent_span_id
        assert about(root) == {
            "seq": late["seq"], "job_id": late["job_id"], "security_id": "S", "earliest_date": "2025-01-04",
            "reason": "price",
        }  # fmt: skip
        assert root.start_time_unix_nano == pytest.approx(late["issued_at"].timestamp() * 1e9, abs=2e3)
        assert root.end_time_unix_nano == pytest.approx(late["right_at"].timestamp() * 1e9, abs=2e3)
        assert [about(span)["keys"] for span in by_name["reset"]] == [3]
        for topic in ("reprocessing-triggers", "reprocessing-jobs", "reprocessing-status"):
            records = [r for r in await running.read(topic) if r.key == b"S" and r.value]
            carried = dict(records[-1].headers)["traceparent"].decode()
            assert carried.split("-")[1] == root.trace_id.hex(), topic


def test_what_is_published_on_behalf_of_another_carries_its_own_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")  # nothing is sent
    traces = tracing.start("triggers", load_named(topic_prefix="t-"))

    def carried(number: int) -> list[bytes]:
        """[version, trace, span, flags]"""
        return traces.headers(number)["traceparent"].split(b"-")

    one, two = carried(1), carried(2)
    assert one[1] != two[1]
    with traces.span("decide", 1):
        assert carried(2) == two
        assert carried(1)[1] == one[1]
        assert carried(1)[2] != one[2], "within the span, the span is the parent"


def test_an_endpoint_without_the_packages_is_said_in_one_line(folder: Path) -> None:
    hidden = folder / f"hidden-{uuid.uuid4().hex[:8]}"
    (hidden / "opentelemetry").mkdir(parents=True)
    (hidden / "opentelemetry" / "__init__.py").write_text(
        "raise ModuleNotFoundError('not here', name='opentelemetry')\n"
    )
    root = Path(importlib.util.find_spec("tidemark").origin).parent.parent  # type: ignore[union-attr,arg-type]
    done = subprocess.run(
        [sys.executable, "-m", "tidemark", "worker", "intake"],
        env={
            **os.environ,
            "PYTHONPATH": f"{hidden}:{root}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
            "TIDEMARK_DATA_DIR": str(hidden),
            "TIDEMARK_BROKER_URL": "kafka://127.0.0.1:1",
            "TIDEMARK_DATABASE_URL": "postgresql://x@127.0.0.1:1/x",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "pip install 'tidemark[otel]'" in done.stderr
    assert "Traceback" not in done.stderr
