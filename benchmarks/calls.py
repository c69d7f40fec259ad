"""What a call between apps costs, beside a raw request of nats-py; and what callers see of failovers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

import msgspec
import nats

from benchmarks.failover import STEPPED_ASIDE_SECONDS
from benchmarks.figures import Peer, Run
from benchmarks.stage import APP, LOOK_SECONDS, PLATFORM, Stage
from phalanx import NatsOptions, Platform, Role, system
from phalanx.client import PlatformClient
from phalanx.errors import CallError
from phalanx.messaging.api import Api
from phalanx.testing.nats import NatsServer

CALLERS = 64
CALLS_EACH = 40
"""Of each caller, of either kind, in one round."""

PAIRS = 500
WARM_UP = 100

STREAMS = 8
"""Callers of the steady stream through failovers."""

CALL_SECONDS = 20.0
QUIET_SECONDS = 0.5

Request = Callable[[int], Awaitable[object]]


class Small(msgspec.Struct):
    """The message that goes there and back."""

    number: int
    name: str = "a small typed message"


@contextlib.asynccontextmanager
async def _both() -> AsyncGenerator[tuple[Request, Request]]:
    """A typed call, and a raw request of as many bytes, each over connections of their own."""
    raw = cast("Any", nats)  # its signatures are not typed
    with tempfile.TemporaryDirectory() as directory:
        async with NatsServer() as server, contextlib.AsyncExitStack() as stack:
            platform = Platform("bench", node="n1", nats=server.url(), data_dir=directory, http={"port": 0})
            app = platform.app("orders")

            @app.handle("echo")
            async def echo(small: Small) -> Small:
                return small

            await stack.enter_async_context(platform)
            await platform.wait_for_role("orders", Role.ACTIVE)
            client = PlatformClient("bench", NatsOptions(urls=(server.url(),)))
            api = (await stack.enter_async_context(client)).api("orders")
            responder, requester = [await raw.connect(server.url()) for _ in range(2)]
            stack.push_async_callback(responder.close)
            stack.push_async_callback(requester.close)

            async def answer(message: Any) -> None:
                await message.respond(message.data)

            await responder.subscribe("raw.echo", cb=answer)
            data = msgspec.json.encode(Small(1))

            async def ours(number: int) -> object:
                return await api.call("echo", Small(number), returns=Small, timeout=30)

            async def theirs(number: int) -> object:
                return await requester.request("raw.echo", data, timeout=30)

            for number in range(WARM_UP):
                await ours(number)
                await theirs(number)
            gc.collect()
            yield ours, theirs


async def throughput(run: Run) -> None:
    """64 callers at a time, in turns with raw nats-py; µs for each call."""
    async with _both() as (ours, theirs):
        raw_values: list[float] = []
        for turn in range(run.runs):
            pair = (ours, theirs) if turn % 2 else (theirs, ours)
            found = {each: await _at_once(each) for each in pair}
            raw_values.append(found[theirs])
            run.peer = Peer("nats-py, same run", statistics.median(raw_values), given=False)
            share = found[theirs] / found[ours]
            text = f"{1e6 / found[ours]:.0f} calls/s, raw {1e6 / found[theirs]:.0f}: {share:.2f} x"
            run.add(found[ours], text)


async def _at_once(request: Request) -> float:
    async def caller() -> None:
        for number in range(CALLS_EACH):
            await request(number)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return 1e6 * (time.perf_counter() - began) / (CALLERS * CALLS_EACH)


async def latency(run: Run) -> None:
    """One call after the other, in turns with raw nats-py; ms each."""
    async with _both() as (ours, theirs):
        raw_medians: list[float] = []
        for _ in range(run.runs):
            times: dict[Request, list[float]] = {ours: [], theirs: []}
            for number in range(PAIRS):
                for request in (ours, theirs) if number % 2 else (theirs, ours):
                    began = time.perf_counter()
                    await request(number)
                    times[request].append(1000 * (time.perf_counter() - began))
            one, other = statistics.median(times[ours]), statistics.median(times[theirs])
            raw_medians.append(other)
            run.peer = Peer("nats-py, same run", statistics.median(raw_medians), given=False)
            run.add(one, f"{one:.3f} ms, raw {other:.3f} ms: {one / other:.2f} x")


class _Stream:
    """Callers that never pause: what failed, and the longest call since the last look."""

    def __init__(self, api: Api, method: str) -> None:
        self._api, self._method = api, method
        self.answered = 0
        self.failures: list[str] = []
        self.longest = 0.0

    async def run(self) -> None:
        """One of the callers; ends with cancellation."""
        while True:
            began = system.now()
            try:
                await self._api.call(self._method, timeout=CALL_SECONDS)
            except CallError as error:
                self.failures.append(str(error))
            else:
                self.answered += 1
            self.longest = max(self.longest, system.now() - began)

    def look(self) -> float:
        """The longest call since the last look, in ms."""
        longest, self.longest = self.longest, 0.0
        return 1000 * longest


@contextlib.asynccontextmanager
async def _stream(stage: Stage, method: str) -> AsyncGenerator[_Stream]:
    async with PlatformClient(PLATFORM, NatsOptions(urls=tuple(stage.urls))) as client:
        stream = _Stream(client.api(APP), method)
        callers = [asyncio.create_task(stream.run()) for _ in range(STREAMS)]
        try:
            yield stream
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)


async def _through(run: Run, *, kill: bool, failures: bool) -> None:
    """A steady stream through failovers. The value: how many *failures*, else the longest in ms."""
    method = "read" if kill else "write"
    async with Stage(ttl=5.0, calls=True) as stage, _stream(stage, method) as stream:
        for _ in range(run.runs):
            active = await stage.wait_steady()
            await asyncio.sleep(QUIET_SECONDS if kill else STEPPED_ASIDE_SECONDS)
            usual, before, began = stream.look(), len(stream.failures), system.now()
            stage.forget()
            if kill:
                stage.nodes[active].kill()
            elif (reply := await stage.step_down()).error:
                raise RuntimeError(reply.error)
            event = await stage.next_active(began, timeout=20, other_than=active)
            answered = stream.answered
            while stream.answered < answered + 20 * STREAMS:  # noqa: ASYNC110 - counted, not told
                await asyncio.sleep(LOOK_SECONDS)
            longest, failed = stream.look(), stream.failures[before:]
            text = f"{active} to {event.node}: longest call {longest:.1f} ms (before: {usual:.1f}), "
            run.add(len(failed) if failures else longest, f"{text}{len(failed)} failed")
            run.problems += failed[:3]
            if kill:
                stage.nodes[active].start()
        run.say(f"{stream.answered} calls of {method} were answered, {len(stream.failures)} failed")


handover = functools.partial(_through, kill=False, failures=True)
handover_sigkill = functools.partial(_through, kill=True, failures=True)
leader_pause = functools.partial(_through, kill=False, failures=False)
leader_pause_sigkill = functools.partial(_through, kill=True, failures=False)
