"""``python -m benchmarks.messaging_validation.program``: one node. It writes down what it does, before it
answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random

from phalanx import (
    ActiveContext,
    Backoff,
    CallContext,
    Event,
    Events,
    LockLost,
    Logging,
    NatsOptions,
    PhalanxError,
    Platform,
    Ring,
    Semaphore,
)
from phalanx.coord.locks import Lock
from phalanx.testing.history import History

PLATFORM, APP, RING = "bench", "orders", "sessions"
PARTITIONS, PERMITS, KEYS = 12, 2, 4
FAILS_EVERY = 40
"""Of the events of a key each so-manieth cannot be handled, ever: it has to end among the dead letters."""

LOCK, SEMAPHORE = "backup-window", "imports"


async def hold(history: History, who: str, name: str, held: Lock, seconds: float) -> None:
    """Hold it for a while, with a sign of life after each look at whether it is held still."""
    history.record("held", who, name, held.token)
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)
            held.check()
            history.record("holding", who, name, held.token)
    except LockLost:
        history.record("lost", who, name, held.token)


async def locking(history: History, platform: Platform, who: str) -> None:
    """The lock and the semaphore of the platform, one after the other, for ever."""
    while True:
        with contextlib.suppress(PhalanxError):
            async with platform.lock(LOCK, timeout=10) as held:
                await hold(history, who, LOCK, held, random.uniform(0, 0.03))
            imports: Semaphore = platform.semaphore(SEMAPHORE, permits=PERMITS)
            async with imports.hold(timeout=10) as permit:
                await hold(history, who, SEMAPHORE, permit, random.uniform(0, 0.06))
        await asyncio.sleep(random.uniform(0, 0.05))


def build(history: History, urls: tuple[str, ...], ttl: float) -> Platform:
    """The platform with its apps."""
    platform = Platform(
        PLATFORM, nats=NatsOptions(urls=urls), timings={"ttl": ttl}, logging=Logging(level="warning")
    )
    orders = platform.app(APP, events=Events())

    @orders.handle("place")
    async def place(number: str, ctx: CallContext) -> int:  # pyright: ignore[reportUnusedFunction]
        history.record("placed", ctx.node, APP, ctx.epoch, id=number)
        await asyncio.sleep(0.001)
        return ctx.epoch

    @orders.handle("look", idempotent=True)
    async def look(number: str, ctx: CallContext) -> int:  # pyright: ignore[reportUnusedFunction]
        history.record("looked", ctx.node, APP, ctx.epoch, id=number)
        return ctx.epoch

    @orders.on_active
    async def active(ctx: ActiveContext) -> None:  # pyright: ignore[reportUnusedFunction]
        history.record("active", ctx.node, APP, ctx.epoch)
        ctx.ready()
        number = 0
        while True:
            number += 1
            key = f"k{number % KEYS}"
            event = {"epoch": ctx.epoch, "number": number}
            try:
                await ctx.events.publish("job.made", event, key=key)
            except PhalanxError as error:
                history.record(
                    "unpublished", ctx.node, APP, ctx.epoch, key=key, number=number, why=str(error)
                )
            else:
                history.record("published", ctx.node, APP, ctx.epoch, key=key, number=number)
            await asyncio.sleep(0.02)

    @orders.on_event("job.*", durable="worker", retries=2, retry=Backoff(first=0.05, longest=0.1))
    async def work(event: Event[dict[str, int]]) -> None:  # pyright: ignore[reportUnusedFunction]
        epoch, number = event.data["epoch"], event.data["number"]
        if number % FAILS_EVERY == 0:
            raise RuntimeError("cannot be handled")
        history.record("handled", platform.config.node, event.key, epoch, number=number)

    sessions = platform.app(RING, Ring(partitions=PARTITIONS))

    @sessions.handle("touch", idempotent=True)
    async def touch(number: str, ctx: CallContext) -> int:  # pyright: ignore[reportUnusedFunction]
        history.record("touched", ctx.node, RING, ctx.epoch, partition=ctx.partition, id=number)
        return ctx.epoch

    return platform


async def main() -> None:
    """Run until SIGTERM."""
    given = json.loads(os.environ["PHALANX_TEST"])
    history = History(given["history"])
    platform = build(history, tuple(given["urls"]), given["ttl"])
    async with platform:
        work = [
            asyncio.create_task(locking(history, platform, f"{platform.config.node}/{number}"))
            for number in range(2)
        ]
        try:
            await platform.wait()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
