"""Whole nodes that run a systemd unit each: what becomes of it when they, or their keepers, are killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.systemd_units import remove_unit, systemctl, try_systemctl

from phalanx import units
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes

pytestmark = pytest.mark.in_systemd

TEMPLATE = "phalanx-nodes@.service"
PROGRAM = """
from phalanx import ActivePassive, Platform, Systemd

platform = Platform("test", timings={"ttl": 2.0})
platform.app("wiki", ActivePassive(), backend=Systemd(f"phalanx-nodes@{platform.config.node}"))
platform.run()
"""


@pytest.fixture
def nodes(nats_server: NatsServer) -> Iterator[Nodes]:
    """Two nodes on one host, each with an instance of the same template."""
    (units.DROP_INS / TEMPLATE).write_text(
        "[Service]\nExecStart=/bin/sleep 1000\nRestart=always\nRestartSec=0\n"
    )
    systemctl("daemon-reload")
    try:
        with Nodes([sys.executable, "-c", PROGRAM], nats_server.urls, count=2) as started:
            yield started
    finally:
        for node in ("n1", "n2"):
            remove_unit(unit_of(node))
        Path(units.DROP_INS / TEMPLATE).unlink()
        systemctl("daemon-reload")


def unit_of(node: str) -> str:
    """The unit that *node* runs while it is active."""
    return f"phalanx-nodes@{node}.service"


def runs(node: str) -> bool:
    """Whether anything of its unit runs."""
    return systemctl("is-active", unit_of(node), check=False) not in ("inactive", "failed")


async def settled(nodes: Nodes) -> tuple[str, str]:
    """The active node, whose unit runs, and the standby."""
    active = await nodes.wait_for_active("wiki")
    await nodes.wait_for_standbys("wiki", 1)
    (standby,) = {node.node for node in nodes} - {active}
    assert runs(active)
    assert not runs(standby)
    return active, standby


async def test_g1_killed_nodes_unit_is_ended_by_its_keeper(nodes: Nodes) -> None:
    """SIGKILL of the active node: its unit is gone when the other one is active, and does not come back."""
    active, standby = await settled(nodes)
    nodes[active].kill()
    assert await nodes.wait_for_active("wiki", other_than=active) == standby
    assert not runs(active)
    assert runs(standby)
    assert "Assertion failed" in try_systemctl("start", unit_of(active))


async def test_g10_unit_is_handed_over_when_its_node_ends(nodes: Nodes) -> None:
    """SIGTERM of the active node: a graceful stop of its unit, then the other one starts its own."""
    active, standby = await settled(nodes)
    nodes[active].terminate()
    assert await nodes.wait_for_active("wiki", other_than=active) == standby
    assert systemctl("show", "-P", "Result", unit_of(active)) == "success"
    assert not runs(active)


async def test_g1_node_and_keeper_killed_at_once_the_unit_is_ended_nevertheless(nodes: Nodes) -> None:
    """The warden does it, before the other node may be active; the next life of the node starts clean."""
    active, standby = await settled(nodes)
    nodes[active].kill_both()
    assert await nodes.wait_for_active("wiki", other_than=active) == standby
    assert not runs(active)
    nodes[active].start()
    await nodes.wait_for_standbys("wiki", 1)
    assert not units.permit_path(unit_of(active)).exists()


async def test_unit_that_crashes_moves_or_is_restarted(nodes: Nodes) -> None:
    """The end of a unit is an end of the app's work on that node; some node runs it again."""
    active, _ = await settled(nodes)
    before = systemctl("show", "-P", "InvocationID", unit_of(active))
    systemctl("kill", "--signal=KILL", unit_of(active))
    seen = {before}

    def runs_again() -> bool:
        return any(
            node.is_active("wiki") and systemctl("show", "-P", "InvocationID", unit_of(node.node)) not in seen
            for node in nodes
        )

    await nodes.wait_until(runs_again, 20, "it does not run again")
    assert [node.node for node in nodes if runs(node.node)] == nodes.actives("wiki")
