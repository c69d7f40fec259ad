"""The spans of a test, collected by the real SDK of OpenTelemetry."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Spans:
    """What was traced since it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        # A process can set one only once, and would then trace all tests that come after.
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        self.tracer = provider.get_tracer("test")

    def ended(self, name: str = "", kind: trace.SpanKind | None = None) -> list[ReadableSpan]:
        """Those that have ended, in that order."""
        return [
            span
            for span in self._exporter.get_finished_spans()
            if name in ("", span.name) and kind in (None, span.kind)
        ]

    def one(self, name: str, kind: trace.SpanKind | None = None) -> ReadableSpan:
        """The only one of that name."""
        (span,) = self.ended(name, kind)
        return span
