"""A whole host dies: node, keeper, and the embedded nats-server, one of three."""

from __future__ import annotations

import asyncio

from benchmarks.figures import Run
from benchmarks.stage import Stage
from phalanx import system


async def lose_hosts(run: Run, ttl: float) -> None:
    """Kill the active host *run.runs* times, in the steady state → the next on_active, in seconds."""
    async with Stage(ttl=ttl, servers=0) as stage:
        for number in range(run.runs):
            active = await stage.wait_steady(steered=True)
            # The kills fall on all points between two renewals alike.
            await asyncio.sleep(1.0 + ttl / 10 * number / run.runs)
            leader = await stage.stream_leader()
            stage.forget()
            began = system.now()
            stage.nodes[active].kill_host()
            event = await stage.next_active(began, timeout=6 * ttl + 15, other_than=active)
            took = event.at - began
            run.add(took, f"{took:.3f} s, {active} to {event.node}; the app's stream was led by {leader}")
            stage.nodes[active].start()
