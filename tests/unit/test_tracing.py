"""Spans and their context in headers, with the SDK of OpenTelemetry and without anything of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.trace import SpanKind, StatusCode
from tests.spans import Spans

from phalanx.errors import CallError
from phalanx.observe import tracing


def test_nothing_traces_until_the_program_sets_it_up() -> None:
    """Importing the API of OpenTelemetry alone makes no spans, and adds no headers."""
    assert tracing.tracer() is None
    headers = dict[str, str]()
    with tracing.producer_span("orders.placed", headers) as sent, tracing.consumer_span("x", headers) as got:
        tracing.inject(headers)
    assert (sent, got, headers, tracing.extract(headers)) == (None, None, {}, None)


def test_context_goes_through_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on the other side belongs to the trace of who began it, whatever runs there just now."""
    spans = Spans(monkeypatch)
    headers = dict[str, str]()
    with tracing.producer_span("orders.placed", headers, app="orders", node=""):
        pass
    with (
        spans.tracer.start_as_current_span("of somebody else"),
        tracing.consumer_span("orders.placed", {"Traceparent": headers["traceparent"]}, group="billing"),
        spans.tracer.start_as_current_span("inside"),
    ):
        pass
    sent, got = spans.one("send orders.placed"), spans.one("process orders.placed")
    assert (sent.kind, got.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert sent.context is not None
    assert got.context is not None
    assert got.context.trace_id == sent.context.trace_id
    assert got.parent is not None
    assert got.parent.span_id == sent.context.span_id
    inside = spans.one("inside")
    assert inside.parent is not None
    assert inside.parent.span_id == got.context.span_id
    assert dict(sent.attributes or {}) == {
        "messaging.system": "nats",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "orders.placed",
        "phalanx.app": "orders",
    }
    assert (got.attributes or {})["messaging.consumer.group.name"] == "billing"


def test_without_context_a_new_trace_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes without a traceparent, or with a damaged one, does not belong to what runs here."""
    spans = Spans(monkeypatch)
    for headers in ({}, {"traceparent": "00-nonsense"}):
        with (
            spans.tracer.start_as_current_span("of somebody else"),
            tracing.handler_span("orders", "place", headers),
        ):
            pass
    for span in spans.ended("orders/place"):
        assert span.parent is None


def test_failures_are_told_by_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that a handler answers on purpose is none of the server's; one that it did not expect is."""
    spans = Spans(monkeypatch)
    for error in (CallError("sold-out", "nothing left"), RuntimeError("oops")):
        with pytest.raises(type(error)), tracing.handler_span("orders", "place", {}, epoch=7):
            raise error
    with pytest.raises(CallError), tracing.call_span("orders", "place", {}, to="leader"):
        raise CallError("sold-out", "nothing left")
    chosen, unexpected, caller = spans.ended("orders/place")
    assert (chosen.kind, caller.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert (chosen.status.status_code, chosen.events) == (StatusCode.UNSET, ())
    assert (chosen.attributes or {})["error.type"] == "sold-out"
    assert (chosen.attributes or {})["phalanx.epoch"] == 7
    assert unexpected.status.status_code is StatusCode.ERROR
    assert [event.name for event in unexpected.events] == ["exception"]
    assert caller.status.status_code is StatusCode.ERROR
    assert (caller.attributes or {})["rpc.response.status_code"] == "sold-out"
    assert (caller.attributes or {})["rpc.method"] == "orders/place"


def test_nothing_of_opentelemetry_is_imported_or_needed() -> None:
    """A node, a client and their calls load none of it, and work where it cannot be imported."""
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "import phalanx.platform, phalanx.client, phalanx.cli.main\n"
        "from phalanx.observe import tracing\n"
        "with tracing.call_span('a', 'b', {}) as span: assert span is None\n"
        "assert [n for n in sys.modules if n.startswith('opentelemetry')] == ['opentelemetry']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
