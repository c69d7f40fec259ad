"""Middleware on both sides of a call: order, refusals, failures, deadlines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.echo_app import declared, running
from tests.waiting import until

from phalanx import (
    CallContext,
    CallError,
    CallTimeout,
    ConfigError,
    HandlerFailed,
    OutgoingCall,
    Platform,
    current_call,
)
from phalanx.messaging.middleware import Proceed
from phalanx.testing.nats import NatsServer


async def test_both_sides_run_in_the_order_of_their_declaration(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The first is the outermost; each sees what it runs around, and may change what goes through it."""
    platform, app = declared(nats_server, tmp_path)
    seen = list[str]()

    @app.middleware
    async def outer(call: CallContext, proceed: Proceed) -> Any:
        seen.append(f"outer {call.method} {call.caller} {call.headers['Tenant']} {call.epoch == app.epoch}")
        assert call.active is not None
        assert current_call() is call
        answer = await proceed()
        seen.append("outer ends")
        return [*answer, "outer"]

    @app.middleware
    async def inner(call: CallContext, proceed: Proceed) -> Any:
        seen.append(f"inner, {0 < call.remaining_seconds <= 20}")
        return [*await proceed(), "inner"]

    async def tenant(call: OutgoingCall, proceed: Proceed) -> Any:
        seen.append(f"tenant of {call.app}.{call.method}")
        call.headers["Tenant"] = "t1"
        return [*await proceed(), "tenant"]

    async def twice(call: OutgoingCall, proceed: Proceed) -> Any:
        assert (call.request, call.headers["Tenant"], call.timeout) == (["x"], "t1", 20)
        call.request = ["y"]
        await proceed()
        return [*await proceed(), "twice"]

    async with running(platform):
        given = {"Tenant": "nobody"}
        api = platform.api("orders").using(tenant).using(twice)
        answer = await api.call("echo", ["x"], timeout=20, headers=given)
        assert answer == ["y", "inner", "outer", "twice", "tenant"]
        once = ["outer echo n1 t1 True", "inner, True", "outer ends"]
        assert seen == ["tenant of orders.echo", *once, *once]
        assert given == {"Tenant": "nobody"}
        with pytest.raises(LookupError):
            current_call()


async def test_streams_and_broadcasts_go_through_middleware(nats_server: NatsServer, tmp_path: Path) -> None:
    """Those of a caller as those of an app: around all of a stream, and around a call of all nodes."""
    platform, app = declared(nats_server, tmp_path)
    seen = list[str]()

    @app.handle("count")
    async def count(most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number

    @app.middleware
    async def around(call: CallContext, proceed: Proceed) -> Any:
        assert call.headers["Tenant"] == "t1"
        seen.append(f"{call.method} begins")
        answer = await proceed()
        seen.append(f"{call.method} ends")
        return answer

    async def tenant(call: OutgoingCall, proceed: Proceed) -> Any:
        call.headers["Tenant"] = "t1"
        return await proceed()

    async with running(platform):
        api = platform.api("orders").using(tenant)
        assert [item async for item in api.stream("count", 3, returns=int, timeout=20)] == [0, 1, 2]
        await until(lambda: seen == ["count begins", "count ends"])
        assert await api.broadcast("echo", 7, timeout=20) == {"n1": 7}
        assert seen[2:] == ["echo begins", "echo ends"]


async def test_what_a_middleware_raises_is_what_the_caller_gets(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A CallError as it is, all else as "failed" with the traceback in the log; the node stays up."""
    platform, app = declared(nats_server, tmp_path)

    @app.middleware
    async def guard(call: CallContext, proceed: Proceed) -> Any:
        match call.headers.get("Token"):
            case None:
                raise CallError("unauthorized", "send a token")
            case "slow":
                await asyncio.sleep(30)
            case "bad":
                raise RuntimeError("secret words")
            case _:
                pass
        return await proceed()

    async with running(platform):
        api = platform.api("orders")
        with pytest.raises(CallError, match="send a token") as refused:
            await api.call("echo", timeout=20)
        assert (refused.value.code, refused.value.started) == ("unauthorized", True)
        with caplog.at_level(logging.ERROR, "phalanx.calls"), pytest.raises(HandlerFailed) as failed:
            await api.call("echo", timeout=20, headers={"Token": "bad"})
        assert "secret words" not in str(failed.value)
        assert any(record.exc_info for record in caplog.records)
        with pytest.raises(CallTimeout):
            await api.call("echo", timeout=0.3, headers={"Token": "slow"})
        handler = app.handlers.by_name["echo"]
        await until(lambda: handler.running == 0)
        assert handler.errors == 3
        assert await api.call("echo", 1, timeout=20, headers={"Token": "good"}) == 1


async def test_wrong_middleware_is_refused_when_it_is_declared(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Neither what is not async, nor what takes other parameters, nor any on a node that runs."""
    platform, app = declared(nats_server, tmp_path)

    class Instance:
        async def __call__(self, call: Any, proceed: Proceed) -> Any:
            return await proceed()

    async def alone(call: Any) -> Any: ...

    def not_async(call: Any, proceed: Proceed) -> Any: ...

    app.middleware(Instance())
    for wrong, problem in ((alone, "other parameters"), (not_async, "not an async function"), (1, "async")):
        with pytest.raises(ConfigError, match=problem):
            app.middleware(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=problem):
            platform.api("orders").using(wrong)  # type: ignore[arg-type]
    async with running(platform):
        with pytest.raises(ConfigError, match="runs already"):
            app.middleware(Instance())
        assert await platform.api("orders").using(Instance()).call("echo", 1, timeout=20) == 1


def test_middleware_of_a_synchronous_client(nats_server: NatsServer, tmp_path: Path) -> None:
    """It is async also there, and what it raises comes out of the call."""

    async def refuse(call: OutgoingCall, proceed: Proceed) -> Any:
        raise CallError("circuit-open", f"{call.method} is not called just now")

    with (
        Platform.client("test", nats_server.urls) as client,
        pytest.raises(CallError, match="echo is not called"),
    ):
        client.api("orders").using(refuse).call("echo", timeout=20)
