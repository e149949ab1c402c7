"""Corrections as OpenTelemetry traces, from the late input's arrival until the books are right (extra `otel`).

A trace's id is made from the correction's sequence number, and a job has the number of the newest correction that it
was made for. So every worker knows the trace of what it has in hand, and nothing is carried through Postgres. The
header `traceparent` (W3C) carries it on to whoever else reads the topics. The whole is told at the end, by the worker
that finds the books right, from the ledger's own times. Endpoint, sampler and so on: the standard variables OTEL_….
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, TraceFlags

from sinks.corrections import Right
from streams.tracing import Traces

_SCOPE = "tidemark"


class OpenTelemetry(Traces):
    """Sends spans in the background. prefix: of the topics; tells installations with one collector apart."""

    def __init__(self, role: str, prefix: str) -> None:
        self._prefix = prefix
        self._resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", f"tidemark-{role}")})
        self._provider = TracerProvider(resource=self._resource)
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer(_SCOPE)

    @contextmanager
    def span(self, name: str, number: int | None, **about: Any) -> Iterator[None]:
        """A span of the trace, current meanwhile."""
        if number is None:
            yield
            return
        within = trace.set_span_in_context(trace.NonRecordingSpan(self._root(number)))
        with self._tracer.start_as_current_span(name, within, attributes=_attributes(about)):
            yield

    def done(self, name: str, number: int, since: float, **about: Any) -> None:
        """A span of the trace that ends now."""
        self._tell(name, number, since, time.time(), about)

    def right(self, correction: Right) -> None:
        """The root of the trace, and the valuation as its last part; linked to the trace of the job, if another."""
        about = {
            "seq": correction.seq,
            "job_id": correction.job_id,
            "security_id": correction.security_id,
            "earliest_date": correction.earliest_date.isoformat(),
            "reason": correction.reason,
        }
        end = correction.right_at.timestamp()
        self._tell("value", correction.seq, correction.reset_at.timestamp(), end, about)
        links = [] if correction.job_id == correction.seq else [Link(self._root(correction.job_id))]
        self._tell("correction", correction.seq, correction.issued_at.timestamp(), end, about, links, is_root=True)

    def headers(self, number: int) -> dict[str, bytes]:
        """`traceparent`: of the current span where it is of this trace; the end of one job publishes the next one."""
        root = self._root(number)
        here = trace.get_current_span().get_span_context()
        parent = here if here.trace_id == root.trace_id else root
        return {"traceparent": f"00-{parent.trace_id:032x}-{parent.span_id:016x}-{parent.trace_flags:02x}".encode()}

    def _tell(
        self,
        name: str,
        number: int,
        since: float,
        until: float,
        about: dict[str, Any],
        links: list[Link] | None = None,
        is_root: bool = False,
    ) -> None:
        root = self._root(number)
        own = SpanContext(
            root.trace_id, self._provider.id_generator.generate_span_id(), is_remote=False, trace_flags=root.trace_flags
        )
        self._processor.on_end(
            ReadableSpan(
                name,
                context=root if is_root else own,
                parent=None if is_root else root,
                resource=self._resource,
                attributes=_attributes(about),
                links=links or [],
                start_time=int(since * 1e9),
                end_time=int(until * 1e9),
                instrumentation_scope=InstrumentationScope(_SCOPE),
            )
        )

    def _root(self, number: int) -> SpanContext:
        """The same in every worker; sampled as the sampler decides of the trace."""
        digest = hashlib.sha256(f"{self._prefix}|{number}".encode()).digest()
        trace_id, span_id = int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")
        decision = self._provider.sampler.should_sample(None, trace_id, "correction").decision
        flags = TraceFlags(TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
        return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)


def _attributes(about: dict[str, Any]) -> dict[str, Any]:
    return {f"tidemark.{name}": value for name, value in about.items() if value is not None}
