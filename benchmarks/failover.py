"""A node dies, hands over, or stands still; NATS and the other hosts live."""

from __future__ import annotations

import asyncio

from benchmarks.figures import Run
from benchmarks.stage import Stage
from phalanx import system
from phalanx.config import Timings

DEFAULT_TTL = float(Timings().ttl)
STEPPED_ASIDE_SECONDS = 2.5
"""A node that was asked to step down leaves the app to others for 2 s: longer than that between rounds."""

FREEZE_TTL = 2.0


async def sigkill(run: Run) -> None:
    """SIGKILL of the active node's process → the first statement of on_active elsewhere, in ms."""
    async with Stage(ttl=DEFAULT_TTL) as stage:
        for _ in range(run.runs):
            active = await stage.wait_steady()
            # The time to wait for is any point between two renewals.
            await asyncio.sleep(0.5)
            stage.forget()
            began = system.now()
            stage.nodes[active].kill()
            event = await stage.next_active(began, timeout=3 * DEFAULT_TTL, other_than=active)
            run.add(
                1000 * (event.at - began), f"{1000 * (event.at - began):.1f} ms, {active} to {event.node}"
            )
            stage.nodes[active].start()


async def stepdown(run: Run) -> None:
    """The last statement of the old on_active → the first one of the new, in ms."""
    async with Stage(ttl=DEFAULT_TTL) as stage:
        for _ in range(run.runs):
            active = await stage.wait_steady()
            await asyncio.sleep(STEPPED_ASIDE_SECONDS)
            stage.forget()
            began = system.now()
            reply = await stage.step_down()
            if reply.error:
                raise RuntimeError(reply.error)
            event = await stage.next_active(began, timeout=10, other_than=active)
            ended = stage.since(began, "passive")[0].at
            gap = 1000 * (event.at - ended)
            run.add(
                gap, f"{gap:.1f} ms, {active} to {event.node}; asked {1000 * (ended - began):.1f} ms before"
            )


async def freeze(run: Run) -> None:
    """SIGSTOP of the active node for 3 × TTL, then SIGCONT → how long both were active, in ms."""
    async with Stage(ttl=FREEZE_TTL, tick_seconds=0.002) as stage:
        for _ in range(run.runs):
            active = await stage.wait_steady()
            await asyncio.sleep(0.5)
            stage.forget()
            began = system.now()
            stage.nodes[active].freeze()
            event = await stage.next_active(began, timeout=4 * FREEZE_TTL, other_than=active)
            await asyncio.sleep(max(0.0, began + 3 * FREEZE_TTL - system.now()))
            stage.nodes[active].thaw()
            await asyncio.sleep(1.0)  # what it still does, if it does
            last = max(
                (e.at for e in stage.since(began, "tick", "active", "passive") if e.node == active), default=0
            )
            overlap = max(0.0, 1000 * (last - event.at))
            run.add(
                overlap,
                f"{overlap:.1f} ms; {event.node} was active {event.at - began:.2f} s after the freeze",
            )
            stage.nodes[active].stop()
            stage.nodes[active].start()
