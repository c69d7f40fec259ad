"""Spans of OpenTelemetry for calls and events, where the program has set it up. See docs/tracing.md.

Nothing is imported of it here before it is there: there is a tracer once the program itself has imported
``opentelemetry.trace`` and set a tracer provider. Attributes are those of the semantic conventions: RPC
(stable since v1.45) and messaging.

Around what is done, with no cost worth a thought where there is no tracer::

    with tracing.producer_span("orders.placed", headers):  # adds traceparent to the headers
        await bus.publish(subject, data, headers=headers)

    with tracing.consumer_span("orders.placed", headers, group="billing"):  # continues the trace in them
        await handler(event)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from phalanx.errors import CallError
from phalanx.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

NO_SPAN: AbstractContextManager[None] = contextlib.nullcontext()
"""What is entered where nothing traces."""

_SYSTEM = "phalanx"

_tracers: dict[object, Tracer] = {}
"""That of the tracer provider that is set: one entry, or none."""


def tracer() -> Tracer | None:
    """Makes our spans; None: the program traces nothing. It may begin to at any time."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    find = getattr(trace, "get_tracer_provider", None)  # absent while it is being imported
    if find is None:
        return None
    provider = find()
    known = _tracers.get(provider)
    if known is None and not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        _tracers.clear()
        known = _tracers[provider] = provider.get_tracer("phalanx", VERSION)
    return known


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the trace that runs here to *headers*: ``traceparent``, and what else the propagators have."""
    if tracer() is not None:
        from opentelemetry import propagate

        propagate.inject(headers)


def extract(headers: Mapping[str, str]) -> Context | None:
    """The trace that *headers* belong to, an empty context if to none; None: nothing traces here."""
    if tracer() is None:
        return None
    from opentelemetry import propagate
    from opentelemetry.context import Context

    # Header names of NATS tell upper case from lower; other clients write Traceparent.
    return propagate.extract({name.lower(): value for name, value in headers.items()}, Context())


# --- calls


def call_span(
    app: str, method: str, headers: MutableMapping[str, str], **attributes: str
) -> AbstractContextManager[Span | None]:
    """Around a call, with all its tries; the trace goes on in *headers*."""
    made = tracer()
    return NO_SPAN if made is None else _client_span(made, app, method, headers, attributes)


def stream_span(
    app: str, method: str, headers: MutableMapping[str, str], **attributes: str
) -> AbstractContextManager[Span | None]:
    """Around the taking of a stream's items, in an async generator: what its user does belongs to no span of
    ours, so this one is not current."""
    made = tracer()
    return NO_SPAN if made is None else _stream_span(made, app, method, headers, attributes)


def handler_span(
    app: str, method: str, headers: Mapping[str, str], **attributes: str | int
) -> AbstractContextManager[Span | None]:
    """Around a handler; goes on with the trace of the request's *headers*."""
    made = tracer()
    return NO_SPAN if made is None else _server_span(made, app, method, headers, attributes)


@contextlib.contextmanager
def _client_span(
    made: Tracer, app: str, method: str, headers: MutableMapping[str, str], attributes: Mapping[str, str]
) -> Generator[Span]:
    from opentelemetry.trace import SpanKind

    said = {**_of_call(app, method), **_ours(attributes)}
    with _current(made, f"{app}/{method}", SpanKind.CLIENT, said, None) as span:
        inject(headers)
        with _errors_of_caller(span):
            yield span


@contextlib.contextmanager
def _stream_span(
    made: Tracer, app: str, method: str, headers: MutableMapping[str, str], attributes: Mapping[str, str]
) -> Generator[Span]:
    from opentelemetry import propagate, trace

    said = {**_of_call(app, method), **_ours(attributes)}
    span = made.start_span(f"{app}/{method}", kind=trace.SpanKind.CLIENT, attributes=said)
    propagate.inject(headers, trace.set_span_in_context(span))
    try:
        with _errors_of_caller(span):
            yield span
    finally:
        span.end()


@contextlib.contextmanager
def _errors_of_caller(span: Span) -> Generator[None]:
    try:
        yield
    except CallError as error:
        span.set_attribute("rpc.response.status_code", error.code)
        _failed(span, error.code, error.message)
        raise
    except GeneratorExit:  # a stream that was left early, as it may be
        raise
    except BaseException as error:
        _failed(span, type(error).__qualname__, str(error))
        raise


@contextlib.contextmanager
def _server_span(
    made: Tracer, app: str, method: str, headers: Mapping[str, str], attributes: Mapping[str, str | int]
) -> Generator[Span]:
    from opentelemetry.trace import SpanKind

    said = {**_of_call(app, method), **_ours(attributes)}
    with _current(made, f"{app}/{method}", SpanKind.SERVER, said, extract(headers)) as span:
        try:
            yield span
        except CallError as error:
            # An answer that the handler has chosen: it is the caller that has failed.
            span.set_attributes({"rpc.response.status_code": error.code, "error.type": error.code})
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                span.record_exception(error)
            _failed(span, type(error).__qualname__, str(error))
            raise


def _of_call(app: str, method: str) -> dict[str, str | int]:
    return {
        "rpc.system.name": _SYSTEM,
        "rpc.method": f"{app}/{method}",
        "server.address": app,
        "network.protocol.name": "nats",
    }


# --- events


def producer_span(
    destination: str, headers: MutableMapping[str, str], **attributes: str | int
) -> AbstractContextManager[Span | None]:
    """Around the sending of an event to *destination* (low cardinality, like ``orders.placed``).

    The trace goes on in *headers*. *attributes*: more of them, as ``phalanx.<name>``; empty ones
    are left out.
    """
    made = tracer()
    return NO_SPAN if made is None else _producer_span(made, destination, headers, attributes)


def consumer_span(
    destination: str,
    headers: Mapping[str, str],
    *,
    group: str = "",
    message_id: str = "",
    **attributes: str | int,
) -> AbstractContextManager[Span | None]:
    """Around the handling of one event, in the trace of its *headers*. *group*: the durable consumer."""
    made = tracer()
    if made is None:
        return NO_SPAN
    said = {"messaging.consumer.group.name": group, "messaging.message.id": message_id, **_ours(attributes)}
    return _consumer_span(made, destination, headers, said)


@contextlib.contextmanager
def _producer_span(
    made: Tracer, destination: str, headers: MutableMapping[str, str], attributes: Mapping[str, str | int]
) -> Generator[Span]:
    from opentelemetry.trace import SpanKind

    said = {**_of_event("send", destination), **_ours(attributes)}
    with _current(made, f"send {destination}", SpanKind.PRODUCER, said, None) as span:
        inject(headers)
        with _error_is_failure(span):
            yield span


@contextlib.contextmanager
def _consumer_span(
    made: Tracer, destination: str, headers: Mapping[str, str], attributes: Mapping[str, str | int]
) -> Generator[Span]:
    from opentelemetry.trace import SpanKind

    said = {**_of_event("process", destination), **{name: said for name, said in attributes.items() if said}}
    with (
        _current(made, f"process {destination}", SpanKind.CONSUMER, said, extract(headers)) as span,
        _error_is_failure(span),
    ):
        yield span


def _of_event(operation: str, destination: str) -> dict[str, str | int]:
    return {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
    }


# --- spans


@contextlib.contextmanager
def _error_is_failure(span: Span) -> Generator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            span.record_exception(error)
        _failed(span, type(error).__qualname__, str(error))
        raise


@contextlib.contextmanager
def _current(
    made: Tracer, name: str, kind: Any, attributes: Mapping[str, str | int], parent: Context | None
) -> Generator[Span]:
    """A span that what runs inside belongs to. *parent*: None is what runs here."""
    from opentelemetry import context, trace

    span = made.start_span(name, context=parent, kind=kind, attributes=dict(attributes))
    token = context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    finally:
        context.detach(token)
        span.end()


def _failed(span: Span, kind: str, message: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, message[:1000]))


def _ours(attributes: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"phalanx.{name}": value for name, value in attributes.items() if value}


__all__ = [
    "NO_SPAN",
    "call_span",
    "consumer_span",
    "extract",
    "handler_span",
    "inject",
    "producer_span",
    "stream_span",
    "tracer",
]
