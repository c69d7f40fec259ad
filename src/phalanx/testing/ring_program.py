"""``python -m phalanx.testing.ring_program``: a node of a ring that writes down what it owns and answers.

Configured by the environment, as ``phalanx.testing.program``: ``PHALANX_TEST`` holds :class:`RingSettings`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import msgspec

from phalanx import CallContext, Fence, Logging, PartitionContext, Platform, Ring
from phalanx.testing.history import Event, History

RING_PROGRAM = (sys.executable, "-m", "phalanx.testing.ring_program")
RING = "sessions"
"""The name of the app."""


class RingSettings(msgspec.Struct, kw_only=True):
    """What the program runs. ``own_seconds``: how long ``on_own`` takes. ``fence``: fields of the fence
    declaration."""

    history: str
    platform: str = "test"
    ttl: float = 2.0
    partitions: int = 64
    own_seconds: float = 0.0
    settle: float = 0.2
    fence: dict[str, Any] = {}
    log_level: str = "info"


class Answer(msgspec.Struct, frozen=True):
    """Who has answered for a key."""

    node: str
    partition: int
    epoch: int


def build(settings: RingSettings) -> Platform:
    """The platform with its ring."""
    history = History(settings.history)
    platform = Platform(
        settings.platform,
        timings={"ttl": settings.ttl},
        fence=Fence(**settings.fence) if settings.fence else None,
        logging=Logging(level=settings.log_level),  # type: ignore[arg-type]
    )
    app = platform.app(RING, Ring(partitions=settings.partitions, settle=settings.settle))
    node = platform.config.node

    @app.on_own
    async def own(partition: int, ctx: PartitionContext) -> None:  # pyright: ignore[reportUnusedFunction]
        history.record("own", node, RING, ctx.epoch, partition=partition)
        if settings.own_seconds:
            await asyncio.sleep(settings.own_seconds)
        history.record("owned", node, RING, ctx.epoch, partition=partition)

    @app.on_release
    async def release(partition: int, ctx: PartitionContext) -> None:  # pyright: ignore[reportUnusedFunction]
        history.record("release", node, RING, ctx.epoch, partition=partition)

    @app.handle("get", idempotent=True)
    async def get(key: str, ctx: CallContext) -> Answer:  # pyright: ignore[reportUnusedFunction]
        assert ctx.partition is not None
        history.record("answer", node, RING, ctx.epoch, partition=ctx.partition)
        return Answer(node, ctx.partition, ctx.epoch)

    return platform


def ring_violations(events: list[Event]) -> list[str]:
    """What contradicts G6 in *events*, in order of time: an owner that begins, or answers, when a later one
    has begun; two under one epoch; an answer by who has given the partition back."""
    problems: list[str] = []
    newest: dict[int, Event] = {}
    released: set[tuple[int, int]] = set()
    for event in events:
        partition = int(event.data.get("partition", -1))
        present, what = newest.get(partition), f"partition {partition}, {event.node} (epoch {event.epoch})"
        if event.kind == "own":
            if present is not None and event.epoch <= present.epoch:
                problems.append(f"{what}: begins after epoch {present.epoch} of {present.node}")
            newest[partition] = event
        elif event.kind in ("owned", "release", "answer"):
            if present is None or (event.node, event.epoch) != (present.node, present.epoch):
                now = f"{present.node} (epoch {present.epoch})" if present is not None else "nobody"
                problems.append(f"{what}: {event.kind} while it is owned by {now}")
            elif event.kind == "answer" and (partition, event.epoch) in released:
                problems.append(f"{what}: answers after it has released it")
            if event.kind == "release":
                released.add((partition, event.epoch))
    return problems


def main() -> None:
    """Run it."""
    build(msgspec.json.decode(os.environ["PHALANX_TEST"], type=RingSettings)).run()


if __name__ == "__main__":
    main()
