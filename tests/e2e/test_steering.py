"""The leader of an app's stream is kept off the host of the app's active node."""

from __future__ import annotations

import asyncio
from pathlib import Path

from phalanx.testing.nats import NatsCluster
from phalanx.testing.stage import stage

STREAM = "KV_test_wiki"


async def test_stream_leader_leaves_the_host_of_the_active_node(tmp_path: Path) -> None:
    """After an activation, and again after the leader has been put back there on purpose."""
    with NatsCluster(3) as nats, stage(tmp_path, nats) as s:
        active = await s.settled()
        local = nats.name(int(active.removeprefix("n")) - 1)

        def is_elsewhere() -> bool:
            return nats.stream_leader(STREAM) not in (None, local)

        await s.nodes.wait_until(is_elsewhere, 15, "the stream is led on the active node's host")
        s.nodes[active].terminate()
        successor = await s.nodes.wait_for_active("wiki", other_than=active)
        local = nats.name(int(successor.removeprefix("n")) - 1)
        await s.nodes.wait_until(is_elsewhere, 15, "the stream is led on the new active node's host")
        await asyncio.to_thread(s.nodes[active].wait, 10)
        assert s.nodes.actives("wiki") == [successor]
        s.check()
