"""Nodes that take over only when an operator names them, and preferences among the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.waiting import until

from phalanx import NatsOptions
from phalanx.client import PlatformClient
from phalanx.observe.audit import AuditEntry
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import since_now, stage

LONG_FREE_SECONDS = 0.5
"""A free key is taken within some 100 ms by whoever may take it."""


async def test_three_nodes_one_without_failover_is_passed_over_until_it_is_named(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Crashes pass it over, and it stays passive as the last one alive; a hand-over to it by name works."""
    options = NatsOptions(urls=tuple(nats_server.urls))
    with stage(tmp_path, nats_server, no_failover=("n1",)) as s:
        other = {"n2": "n3", "n3": "n2"}[await s.settled()]
        async with PlatformClient("test", options) as client:
            done = await client.step_down("wiki", reason="a test")
            assert (done.successor, done.active) == (other, other)
            done = await client.step_down("wiki", to="n1", reason="a test")
            assert (done.successor, done.active) == ("n1", "n1")

            async def acquired() -> AuditEntry | None:
                entries = [e for e in await client.audit() if e.action == "leader-acquired"]
                return next((e for e in entries if e.epoch == done.epoch), None)

            entry = await until(acquired)
            assert (entry.node, entry.details["previous"], entry.details["how"]) == ("n1", other, "released")
            assert entry.details["named"] == "yes"
            assert int(entry.details["previous_epoch"]) < entry.epoch
            killed = since_now()
            s.nodes["n1"].kill()
            assert (await s.next_active(killed)).node in ("n2", "n3")
            s.nodes["n1"].start()
            await s.nodes.wait_for_standbys("wiki", 2)
            gone = since_now()
            for node in ("n2", "n3"):
                s.nodes[node].stop()

            async def alone() -> bool:
                return {view.node for view in await client.nodes() if view.is_live} == {"n1"}

            await until(alone)
        await asyncio.sleep(LONG_FREE_SECONDS)
        assert s.nodes["n1"].is_standby("wiki")
        assert [event for event in s.history.events("active", since=gone) if event.node == "n1"] == []
        s.check()
