"""Traces of OpenTelemetry through calls, events and failovers, with its real SDK; nodes without any of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.trace import SpanKind, StatusCode
from tests.e2e.echo_app import declared, running
from tests.spans import Spans
from tests.waiting import until

from phalanx import (
    CallContext,
    Event,
    HandlerFailed,
    Leader,
    NoHandlers,
    Platform,
    Role,
)
from phalanx.testing.nats import NatsServer


async def test_trace_goes_through_a_call_and_the_calls_of_its_handler(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client span, server span, and those of the call that the handler makes itself: one trace."""
    spans = Spans(monkeypatch)
    platform, app = declared(nats_server, tmp_path)
    platform.app("plain")

    @app.handle("relay")
    async def relay(value: int, ctx: CallContext) -> int:
        assert "traceparent" in ctx.headers
        return await platform.api("orders").call("echo", value, returns=int)

    @app.handle("fail")
    async def fail() -> None:
        raise RuntimeError("oops")

    async with running(platform):
        with spans.tracer.start_as_current_span("request"):
            assert await platform.api("orders").call("relay", 7, returns=int, to=Leader, timeout=20) == 7
        with pytest.raises(HandlerFailed):
            await platform.api("orders").call("fail", timeout=20)
        with pytest.raises(NoHandlers):
            await platform.api("plain").call("echo", timeout=20)
        await until(lambda: len(spans.ended()) == 8)
        epoch = app.epoch
    request = spans.one("request")
    outer, relayed = (spans.one("orders/relay", kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
    inner, echoed = (spans.one("orders/echo", kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
    chain = [request, outer, relayed, inner, echoed]
    for above, below in itertools.pairwise(chain):
        assert above.context is not None
        assert below.parent is not None
        assert below.parent.span_id == above.context.span_id
    attributes = relayed.attributes or {}
    assert (attributes["phalanx.node"], attributes["phalanx.epoch"]) == ("n1", epoch)
    assert (outer.attributes or {})["phalanx.to"] == "leader"
    assert spans.one("orders/fail", SpanKind.SERVER).status.status_code is StatusCode.ERROR
    failed = spans.one("orders/fail", SpanKind.CLIENT).attributes or {}
    assert failed["rpc.response.status_code"] == "failed"
    nobody = spans.one("plain/echo", SpanKind.CLIENT)
    assert (nobody.attributes or {})["error.type"] == "no-handlers"


async def test_failover_is_traced_by_the_node_that_takes_over(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n1 hands over to n2: one trace with the steps of both, and a first one of n1's own beginning."""
    monkeypatch.setattr("phalanx.observe.failover_spans.LOOK_EVERY_SECONDS", 0.05)
    spans = Spans(monkeypatch)
    platforms = {name: Platform("test", node=name, nats=nats_server.urls, data_dir=str(tmp_path / name),
                                http={"enabled": False}) for name in ("n1", "n2")}  # fmt: skip
    apps = {name: platform.app("orders") for name, platform in platforms.items()}
    async with running(platforms["n1"]), platforms["n2"]:
        await until(lambda: any(c.eligible and c.session.node == "n2" for c in apps["n1"].candidates()))
        await apps["n1"].step_down(to="n2")
        await platforms["n2"].wait_for_role("orders", Role.ACTIVE)
        await until(lambda: spans.ended("failover orders"))
        epoch = apps["n2"].epoch
    span = spans.one("failover orders")
    said = span.attributes or {}
    assert (said["phalanx.previous"], said["phalanx.node"], said["phalanx.epoch"]) == ("n1", "n2", epoch)
    assert said["phalanx.how"] == "released"
    assert span.context is not None
    inside = [each for each in spans.ended() if each.parent and each.parent.span_id == span.context.span_id]
    assert "key taken" in {each.name for each in inside}
    assert {(event.attributes or {})["phalanx.node"] for event in span.events} >= {"n1", "n2"}
    assert spans.ended("activation orders")


async def test_trace_goes_through_streams_and_broadcasts(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides have a span of each; a stream that is left early has not failed, and is nobody's parent."""
    spans = Spans(monkeypatch)
    platform, app = declared(nats_server, tmp_path)

    @app.handle("count")
    async def count() -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    async with running(platform):
        api = platform.api("orders")
        with spans.tracer.start_as_current_span("request"):
            async with contextlib.aclosing(api.stream("count", timeout=20)) as items:
                async for _ in items:
                    with spans.tracer.start_as_current_span("between"):
                        break
            await api.broadcast("echo", 7, timeout=20)
        await until(lambda: len(spans.ended()) == 6)
    request, between = spans.one("request"), spans.one("between")
    assert request.context is not None
    for name in ("orders/count", "orders/echo"):
        client, server = (spans.one(name, kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
        assert client.context is not None
        assert client.parent is not None
        assert server.parent is not None
        assert client.parent.span_id == request.context.span_id
        assert server.parent.span_id == client.context.span_id
        assert client.status.status_code is StatusCode.UNSET
    assert between.parent is not None
    assert between.parent.span_id == request.context.span_id


async def test_trace_goes_through_an_event(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who publishes, the event, its handler, and the call that this makes: one trace."""
    spans = Spans(monkeypatch)
    platform, app = declared(nats_server, tmp_path)

    @app.on_event("order.*", durable="mailer")
    async def mail(event: Event[int]) -> None:
        assert "traceparent" in event.headers
        await platform.api("orders").call("echo", event.data, timeout=20)

    async with running(platform):
        with spans.tracer.start_as_current_span("request"):
            await app.events.publish("order.placed", 7)
        await until(lambda: spans.ended("process order.placed"))
    chain = [
        spans.one("request"),
        spans.one("send order.placed", SpanKind.PRODUCER),
        spans.one("process order.placed", SpanKind.CONSUMER),
        spans.one("orders/echo", SpanKind.CLIENT),
        spans.one("orders/echo", SpanKind.SERVER),
    ]
    for above, below in itertools.pairwise(chain):
        assert above.context is not None
        assert below.parent is not None
        assert below.parent.span_id == above.context.span_id
    assert (chain[2].attributes or {})["messaging.consumer.group.name"] == "mailer"


_WITHOUT = """
import asyncio, sys

for name in ("opentelemetry", "pydantic"):
    sys.modules[name] = None  # so that it cannot be imported
from phalanx import CallContext, CallError, Event, Leader, Platform

platform = Platform("test", node="n1", http={"enabled": False})
orders = platform.app("orders")
mailed = asyncio.Event()


@orders.handle("echo")
async def echo(value: int) -> int:
    return value


@orders.on_event("order.*", durable="mailer")
async def mail(event: Event[int]) -> None:
    mailed.set()


async def main() -> None:
    async with platform:
        assert await platform.api("orders").call("echo", 7, returns=int, to=Leader, timeout=60) == 7
        await orders.events.publish("order.placed", 7)
        async with asyncio.timeout(60):
            await mailed.wait()
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("opentelemetry", "pydantic")]
    assert sorted(loaded) == ["opentelemetry", "pydantic"], loaded


asyncio.run(main())
"""


async def test_node_without_opentelemetry(nats_server: NatsServer, tmp_path: Path) -> None:
    """Calls, events and an activation where neither it nor pydantic can be imported, nor is asked for."""
    env = {**os.environ, "PHALANX_NATS": nats_server.url(), "PHALANX_DATA": str(tmp_path)}
    command = [sys.executable, "-c", _WITHOUT]
    done = await asyncio.to_thread(
        subprocess.run, command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
