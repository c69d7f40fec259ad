"""What taking a free lock and releasing it costs, beside two operations on a key with nats-py alone."""

from __future__ import annotations

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

PAIRS = 300
"""Cycles of either kind in one round."""

WARM_UP = 100
VALUE = b"x" * 64


async def cycle(run: Run) -> None:
    """A lock of an app taken and released, in turns with create and delete by nats-py; ms each."""
    with tempfile.TemporaryDirectory() as directory:
        async with NatsServer() as server:
            platform = Platform("bench", node="n1", nats=server.url(), data_dir=directory, http={"port": 0})
            app = platform.app("wiki")
            raw = cast("Any", nats)  # its signatures are not typed
            client = await raw.connect(server.url())
            bucket = await client.jetstream().create_key_value(KeyValueConfig(bucket="raw", history=1))

            async def ours(number: int) -> None:
                held = await app.locks.acquire("cycle")
                await held.release()

            async def theirs(number: int) -> None:
                # A key of its own: creating one that was deleted costs nats-py three requests.
                await bucket.create(f"cycle.{number}", VALUE)
                await bucket.delete(f"cycle.{number}")

            try:
                async with platform:
                    await _compare(run, ours, theirs)
            finally:
                await client.close()


async def _compare(
    run: Run, ours: Callable[[int], Awaitable[None]], theirs: Callable[[int], Awaitable[None]]
) -> None:
    for number in range(WARM_UP):
        await ours(number)
        await theirs(number)
    raw_medians: list[float] = []
    for turn in range(run.runs):
        gc.collect()
        mine: list[float] = []
        raw: list[float] = []
        for number in range(WARM_UP + turn * PAIRS, WARM_UP + (turn + 1) * PAIRS):
            pair = [(ours, mine), (theirs, raw)]
            # Each goes first in every second pair, so that neither profits from the other's wake-up.
            for work, times in pair if number % 2 else reversed(pair):
                began = time.perf_counter()
                await work(number)
                times.append(1000 * (time.perf_counter() - began))
        one, other = statistics.median(mine), statistics.median(raw)
        raw_medians.append(other)
        run.peer = Peer("nats-py, same run", statistics.median(raw_medians), given=False)
        run.add(
            one,
            f"{one / other:.3f} x: {one:.3f} ms (min {min(mine):.3f}, max {max(mine):.1f}), "
            f"raw nats-py {other:.3f} ms (min {min(raw):.3f}, max {max(raw):.1f})",
        )
