"""What a put in an app's KV costs, beside one of nats-py alone."""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import nats
from nats.js.api import KeyValueConfig

from benchmarks.figures import Peer, Run
from phalanx import Platform
from phalanx.testing.nats import NatsServer

PAIRS = 500
"""Puts of either kind in one round."""

WARM_UP = 100
VALUE = b"x" * 128


async def put(run: Run) -> None:
    """Puts of 128 bytes, one after the other, in turns with raw nats-py, on one server; ms each."""
    with tempfile.TemporaryDirectory() as directory:
        async with NatsServer() as server:
            platform = Platform("bench", node="n1", nats=server.url(), data_dir=directory, http={"port": 0})
            app = platform.app("wiki")
            raw = cast("Any", nats)  # its signatures are not typed
            client = await raw.connect(server.url())
            bucket = await client.jetstream().create_key_value(KeyValueConfig(bucket="raw", history=8))
            try:
                async with platform:
                    await _compare(
                        run, lambda key: app.kv.put(key, VALUE), lambda key: bucket.put(key, VALUE)
                    )
            finally:
                await client.close()


async def _compare(
    run: Run, ours: Callable[[str], Awaitable[object]], theirs: Callable[[str], Awaitable[object]]
) -> None:
    for number in range(WARM_UP):
        await ours(f"warm.{number}")
        await theirs(f"warm.{number}")
    raw_medians: list[float] = []
    gc.collect()
    for turn in range(run.runs):
        mine: list[float] = []
        raw: list[float] = []
        for number in range(PAIRS):
            pair = [(ours, mine), (theirs, raw)]
            # Each goes first in every second pair, so that neither profits from the other's wake-up.
            for write, times in pair if number % 2 else reversed(pair):
                times.append(await _timed(write, f"key.{turn}.{number}"))
        one, other = statistics.median(mine), statistics.median(raw)
        raw_medians.append(other)
        run.peer = Peer("nats-py, same run", statistics.median(raw_medians), given=False)
        run.add(one, f"{one:.3f} ms, raw nats-py {other:.3f} ms: {one / other:.3f} x")
        await asyncio.sleep(0)


async def _timed(write: Callable[[str], Awaitable[object]], key: str) -> float:
    began = time.perf_counter()
    await write(key)
    return 1000 * (time.perf_counter() - began)
