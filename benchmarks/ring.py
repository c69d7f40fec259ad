"""The planner of rings: how long a plan takes, and how much it moves."""

from __future__ import annotations

import time

from benchmarks.figures import Run
from phalanx.decide.partition import MAX_PARTITIONS
from phalanx.decide.ring import moves, plan

NODES = 1000


async def planning(run: Run) -> None:
    """One of 1,000 nodes leaves a ring of 16,384 partitions: how long the plan takes; moves = its share."""
    weights = {f"n{number}": 1 for number in range(NODES)}
    present = plan((None,) * MAX_PARTITIONS, weights)
    for number in range(run.runs):
        gone = f"n{number * 37 % NODES}"
        rest = {node: weight for node, weight in weights.items() if node != gone}
        began = time.perf_counter()
        after = plan(present, rest)
        took = (time.perf_counter() - began) * 1000
        moved, share = moves(present, after), present.count(gone)
        run.add(took, f"{took:.1f} ms, {moved} moves, share {share}")
        if moved != share:
            run.problems.append(f"{moved} moves when {gone} left, which had {share} partitions")
