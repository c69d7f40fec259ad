"""What it costs to publish events and to handle them, beside nats-py's JetStream alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

import msgspec
import nats
from nats.js.api import ConsumerConfig

from benchmarks.figures import Peer, Run
from phalanx import App, Event, Events, Platform, Role
from phalanx.testing.nats import NatsServer

PUBLISHERS = 64
EVENTS_EACH = 40
"""Of each publisher, of either kind, in one round."""

CONSUMED = 4096
"""Events that are handled in one round, of either kind."""

BATCH = 256
"""What raw nats-py fetches at a time: as many as a handler has under way, and more."""

CONCURRENCY = 32
KEYS = 500
SECOND = 1_000_000_000

RAW = {
    "name": "raw",
    "subjects": ["raw.>"],
    "storage": "file",
    "max_age": 7 * 86400 * SECOND,
    "max_bytes": 1 << 30,
    "duplicate_window": 120 * SECOND,
}
"""What an app's events are, made by hand."""

Work = Callable[[], Awaitable[float]]


class Small(msgspec.Struct):
    """What the events say."""

    number: int
    name: str = "a small typed event"


_decode = msgspec.json.Decoder(Small).decode


class Handled:
    """What a handler has seen, once its gate is open."""

    def __init__(self, app: App) -> None:
        self.count = 0
        self.gate, self.all = asyncio.Event(), asyncio.Event()

        @app.on_event("made.*", durable="bench", concurrency=CONCURRENCY)
        async def handle(event: Event[Small]) -> None:
            if not self.gate.is_set():
                await self.gate.wait()
            self.count += 1
            if self.count == CONSUMED:
                self.all.set()


@contextlib.asynccontextmanager
async def _stage(*, handles: bool) -> AsyncGenerator[tuple[App, Handled | None, Any]]:
    """An app on a server, its handler, and a raw client with a stream of its own."""
    raw = cast("Any", nats)  # its signatures are not typed
    with tempfile.TemporaryDirectory() as directory:
        async with NatsServer() as server:
            platform = Platform("bench", node="n1", nats=server.url(), data_dir=directory, http={"port": 0})
            app = platform.app("wiki", events=Events())
            handled = Handled(app) if handles else None
            async with platform:
                await platform.wait_for_role("wiki", Role.ACTIVE)
                client = await raw.connect(server.url())
                try:
                    await client.request("$JS.API.STREAM.CREATE.raw", msgspec.json.encode(RAW))
                    yield app, handled, client
                finally:
                    await client.close()


async def _in_turns(run: Run, ours: Work, theirs: Work) -> None:
    """Both in each run, in turns; µs for each event."""
    raw_values: list[float] = []
    await ours()
    await theirs()
    for turn in range(run.runs):
        gc.collect()
        pair = (ours, theirs) if turn % 2 else (theirs, ours)
        found = {each: await each() for each in pair}
        raw_values.append(found[theirs])
        run.peer = Peer("nats-py, same run", statistics.median(raw_values), given=False)
        share = found[theirs] / found[ours]
        run.add(found[ours], f"{1e6 / found[ours]:.0f}/s, raw {1e6 / found[theirs]:.0f}/s: {share:.2f} x")


async def publish(run: Run) -> None:
    """64 publishers at a time, small typed events with an id each, acknowledged by the server."""
    async with _stage(handles=False) as (app, _, client):
        stream, prefix, numbers = client.jetstream(), secrets.token_hex(4), itertools.count()

        async def one() -> None:
            await app.events.publish("made.small", Small(1))

        async def other() -> None:
            headers = {"Nats-Msg-Id": f"{prefix}-{next(numbers)}"}
            await stream.publish("raw.made.small", msgspec.json.encode(Small(1)), headers=headers)

        await _in_turns(run, lambda: _at_once(one), lambda: _at_once(other))


async def _at_once(once: Callable[[], Awaitable[None]]) -> float:
    async def publisher() -> None:
        for _ in range(EVENTS_EACH):
            await once()

    began = time.perf_counter()
    await asyncio.gather(*(publisher() for _ in range(PUBLISHERS)))
    return 1e6 * (time.perf_counter() - began) / (PUBLISHERS * EVENTS_EACH)


async def consume(run: Run) -> None:
    """A durable consumer with explicit acknowledgements works off events of 500 keys."""
    async with _stage(handles=True) as (app, handled, client):
        assert handled is not None
        stream = client.jetstream()
        await stream.add_consumer(
            "raw", ConsumerConfig(durable_name="bench", filter_subject="raw.made.*", max_ack_pending=BATCH)
        )
        raw = await stream.pull_subscribe("raw.made.*", durable="bench", stream="raw")

        async def ours() -> float:
            handled.count = 0
            handled.gate.clear()
            handled.all.clear()
            await _fill(lambda n: app.events.publish("made.small", Small(n), key=f"k{n % KEYS}"))
            began = time.perf_counter()
            handled.gate.set()
            await handled.all.wait()
            return 1e6 * (time.perf_counter() - began) / CONSUMED

        async def theirs() -> float:
            await _fill(lambda n: stream.publish("raw.made.small", msgspec.json.encode(Small(n))))
            count, began = 0, time.perf_counter()
            while count < CONSUMED:
                for message in await raw.fetch(BATCH, timeout=10):
                    _decode(message.data)
                    await message.ack()
                    count += 1
            return 1e6 * (time.perf_counter() - began) / CONSUMED

        await _in_turns(run, ours, theirs)


async def _fill(one: Callable[[int], Awaitable[object]]) -> None:
    for start in range(0, CONSUMED, PUBLISHERS):
        await asyncio.gather(*(one(number) for number in range(start, start + PUBLISHERS)))
