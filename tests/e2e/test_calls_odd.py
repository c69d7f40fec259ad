"""Calls that nobody expects: answers that cannot be sent, calls cancelled while held, odd replies."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_calls import NAMES, barred_node, platform_of

from phalanx import CallError, NatsOptions, Platform, Role
from phalanx.bus.connection import NatsBus
from phalanx.messaging import call_wire as wire
from phalanx.testing.nats import NatsServer


def _deep() -> Any:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    return value


ERRORS = {
    "surrogate": CallError("odd", "half a pair", details={"name": "\udcff"}),
    "code": CallError("od\udcffd", "its code"),
    "path": CallError("odd", "its path", path="$.\udcff"),
    "deep": CallError("odd", "nested", details=_deep()),
    "long": CallError("odd", "x" * 2_000_000),
    "half": CallError("odd", "x" * 600_000),
    "details": CallError("odd", "many", details="y" * 2_000_000),
    "number": CallError("odd", "large", details=1 << 80),
}


async def test_error_that_cannot_be_sent_is_answered_all_the_same(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The caller is told at once that the handler failed, and does not wait for its deadline."""
    platform = platform_of(nats_server, tmp_path, "n1")
    app = platform.app("orders")

    @app.handle("fail")
    async def fail(how: str) -> None:
        raise ERRORS[how]

    async with platform:
        await platform.wait_for_role("orders", Role.ACTIVE)
        api = platform.api("orders")
        for how in ERRORS:
            with pytest.raises(CallError) as caught:
                await api.call("fail", how, timeout=20)
            assert caught.value.started, how
            assert caught.value.code in ("odd", "od?d"), how


async def test_call_that_is_cancelled_while_it_is_held_never_begins(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It waits for a reign that has not begun: whoever runs it later would do so for nobody."""
    async with barred_node(nats_server, tmp_path):
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        try:
            headers = {wire.CALL: wire.call_header("c-7", 60.0, 1 << 40, "somebody")}
            subject = NAMES.call_node_subject("orders", "n1", "echo")
            asked = asyncio.create_task(bus.request(subject, b"1", headers=headers, timeout=30))
            await asyncio.sleep(0)
            bus.send(NAMES.call_cancel_subject("orders"), b"c-7")
            async with asyncio.timeout(10):
                answer = await asked
            problem = wire.problem_of(answer.data, answer.headers)
            assert problem is not None
            assert (problem.code, problem.started) == ("interrupted", False)
        finally:
            await bus.close()


async def test_g5_answer_goes_to_no_subject_of_the_platform(nats_server: NatsServer, tmp_path: Path) -> None:
    """Who may only call an app cannot have its node write what he may not: keys, or JetStream's API."""
    platform = platform_of(nats_server, tmp_path, "n1")
    app = platform.app("orders")
    called = list[int]()

    @app.handle("echo")
    async def echo(number: int) -> int:
        called.append(number)
        return number

    async with platform:
        await platform.wait_for_role("orders", Role.ACTIVE)
        await app.kv.put("mine", "as it was")
        stream = NAMES.bucket_stream(NAMES.app_bucket("orders"))
        key = NAMES.key_subject(NAMES.app_bucket("orders"), "kv.mine")
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        try:
            assert await bus.read(stream, key) is not None
            leader = NAMES.call_leader_subject("orders", "echo")
            for reply in (key, f"$JS.API.STREAM.DELETE.{stream}"):
                for subject in (
                    leader,
                    NAMES.call_who_subject("orders"),
                    NAMES.call_leader_subject("orders", "no"),
                ):
                    bus.send(subject, b"7", reply=reply)
            assert (await bus.request(leader, b"8")).data == b"8"
            entry = await app.kv.get("mine", str)
            assert entry is not None
            assert entry.value == "as it was"
        finally:
            await bus.close()


def test_synchronous_client_that_is_closed_leaves_no_thread_waiting(nats_server: NatsServer) -> None:
    """Other threads call all the time: each of their calls ends, at the latest with the close."""
    threads = list[threading.Thread]()
    stop = threading.Event()

    def work(client: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(Exception):
                client.run(asyncio.sleep(0))

    for _ in range(20):
        with Platform.client("test", nats_server.urls) as client:
            threads = [threading.Thread(target=work, args=(client,), daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        stop.clear()


async def test_client_thread_ends_what_runs_when_it_is_closed() -> None:
    """Whoever waits for something that would never end is told that the client was closed."""
    from phalanx.client_sync import LoopThread

    thread = LoopThread("test")
    begun = threading.Event()

    async def for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(asyncio.to_thread(thread.run, for_ever()))
    await asyncio.to_thread(begun.wait, 10)
    await asyncio.to_thread(thread.close)
    with pytest.raises(RuntimeError, match="closed"):
        async with asyncio.timeout(10):
            await waiting
    with pytest.raises(RuntimeError):
        thread.run(for_ever())
