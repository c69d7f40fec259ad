"""What a node and its keeper take while nothing happens."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from benchmarks.figures import Run
from benchmarks.stage import Stage
from phalanx import system

APPS = tuple(f"app{number}" for number in range(1, 21))
TTL = 5.0
IDLE_SECONDS = 10.0
"""After the start, before anything is measured."""

WINDOW_SECONDS = 30.0
HOUR = 3600.0


def _stage() -> Stage:
    """Three nodes with twenty apps, whose hooks wait; the nats-servers are processes of their own."""
    return Stage(ttl=TTL, apps=APPS, tick_seconds=HOUR)


async def memory(run: Run) -> None:
    """Resident memory of node and keeper, of each of three nodes, in MB (10**6 bytes)."""
    async with _stage() as stage:
        await asyncio.sleep(IDLE_SECONDS)
        for node in stage.nodes:
            own, keeper = _memory(node.pid), _memory(node.keeper_pid)
            rss = own["Rss"] + keeper["Rss"]
            actives = sum(1 for app in APPS if node.is_active(app))
            run.add(
                rss,
                f"{node.node}: {rss:.1f} MB = node {own['Rss']:.1f} + keeper {keeper['Rss']:.1f}; "
                f"active for {actives} apps; proportional {own['Pss'] + keeper['Pss']:.1f}",
            )


def _memory(pid: int) -> dict[str, float]:
    """The fields of smaps_rollup in MB. RSS counts shared pages in full, PSS in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): int(field[1]) * 1024 / 1e6 for field in fields}


async def idle_cpu(run: Run) -> None:
    """Processor time of node and keeper in 30 s, of each of three nodes, in percent of one core."""
    async with _stage() as stage:
        await asyncio.sleep(IDLE_SECONDS)
        before = {node.node: (_seconds(node.pid), _seconds(node.keeper_pid)) for node in stage.nodes}
        began = system.now()
        await asyncio.sleep(WINDOW_SECONDS)
        lasted = system.now() - began
        after = {node.node: (_seconds(node.pid), _seconds(node.keeper_pid)) for node in stage.nodes}
        for name in before:
            own, keeper = (100 * (b - a) / lasted for a, b in zip(before[name], after[name], strict=True))
            run.add(own + keeper, f"{name}: {own + keeper:.2f} % = node {own:.2f} + keeper {keeper:.2f}")


def _seconds(pid: int) -> float:
    """User and system time of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
