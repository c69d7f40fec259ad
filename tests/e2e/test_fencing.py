"""What becomes of programs, and of the node itself, when the keeper has to see to it: real processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from phalanx import system
from phalanx.keeper.fencing import LeftOversUnknown, Registry
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess
from phalanx.testing.stage import stage
from phalanx.types import Resource

LASTING = Resource("process", "wiki.1.ab", "wiki", 1)


def blocked(directory: Path, name: str = "registered.json") -> Path:
    """A data directory in which the list of what runs can't be written."""
    (directory / name).mkdir(parents=True)
    return directory


# --- the list that can't be written


@pytest.mark.parametrize("name", ["registered.json", "registered.tmp"])
def test_what_cannot_be_noted_is_not_registered(tmp_path: Path, name: str) -> None:
    """A new entry that did not reach the file is not there; code inside the node needs no file."""
    registry = Registry(blocked(tmp_path, name))
    assert registry.left_over() == []
    with pytest.raises(IsADirectoryError, match="registered"):
        registry.add(LASTING)
    assert registry.resources == []
    section = Resource("section", "section.wiki.1", "wiki", 1)
    registry.add(section)
    assert registry.resources == [section]


def test_what_runs_stays_registered_when_its_group_cannot_be_noted(tmp_path: Path) -> None:
    """It runs already, so the keeper must go on to know it, with its group; removing it never fails."""
    registry = Registry(tmp_path)
    registry.add(LASTING)
    (tmp_path / "registered.tmp").mkdir()
    grouped = Resource("process", LASTING.id, "wiki", 1, pgid=4711, start_time=5)
    with pytest.raises(IsADirectoryError, match="registered"):
        registry.add(grouped)
    assert registry.resources == [grouped]
    assert registry.left_over() == [LASTING]
    registry.remove(LASTING.id)
    assert registry.resources == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"boot_id": 7}'])
def test_damaged_list_of_this_boot_lets_nothing_begin(tmp_path: Path, content: bytes) -> None:
    """G1: what is left may run, so its node may not begin; after a loss of power nothing of it runs."""
    path = tmp_path / "registered.json"
    path.write_bytes(content)
    with pytest.raises(LeftOversUnknown, match="then remove the file"):
        Registry(tmp_path).left_over()
    before_boot = system.wall() - system.now() - 60
    os.utime(path, (before_boot, before_boot))
    assert Registry(tmp_path).left_over() == []


async def test_node_with_a_damaged_list_begins_once_it_is_removed(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The node says what to do and has no session meanwhile; then it starts by itself."""
    with stage(tmp_path, nats_server, count=1, ttl=1.0) as s:
        await s.settled()
        node = s.nodes["n1"]
        node.kill_both()
        path = node.data_dir / "registered.json"
        path.write_bytes(b"{")
        node.start()
        await s.nodes.wait_until(lambda: "then remove the file" in node.log(), 20, "it does not say so")
        path.unlink()
        await s.nodes.wait_for_active("wiki")
        s.check()


async def test_full_disk_moves_the_app_and_kills_no_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """A node that cannot note what it starts stays alive, says why, and another node takes over."""
    with stage(tmp_path, nats_server, count=2, backend="sleep 1000", hooks=False) as s:
        active = await s.settled()
        node: NodeProcess = s.nodes[active]
        other = next(n.node for n in s.nodes if n.node != active)
        node.stop()
        file = node.data_dir / "registered.json"
        file.unlink(missing_ok=True)
        blocked(node.data_dir)
        try:
            node.start()
            await s.nodes.wait_for_active("wiki", other_than=active)
            await s.nodes.wait_for_standbys("wiki", 1)
            s.nodes[other].kill()
            problem = "cannot take note of it"
            await s.nodes.wait_until(lambda: problem in node.log(), 20, "it did not say why")
            keeper = system.ProcessRef.of(node.keeper_pid)
            s.nodes[other].start()
            await s.nodes.wait_for_active("wiki", other_than=active)
            assert node.is_running
            assert keeper.alive()
            assert not node.is_active("wiki")
        finally:
            file.rmdir()


# --- programs that hide


HIDES = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(1000)"], env={}, start_new_session=True
)
with open(sys.argv[1], "a") as file:
    file.write(f"{child.pid}\\n")
time.sleep(1000)
"""


async def test_g1_frozen_nodes_hidden_processes_are_found_before_it_is_killed(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A child with a session and an environment of its own; its parent dies with the node that is fenced."""
    script, pids = tmp_path / "hides.py", tmp_path / "pids"
    script.write_text(HIDES)
    program = f"{sys.executable} {script} {pids}"
    with stage(tmp_path, nats_server, count=2, ttl=1.0, backend=program, hooks=True) as s:
        active = await s.settled()
        await s.nodes.wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), 10, "no child")
        hidden = system.ProcessRef.of(int(pids.read_text()))
        assert hidden.alive()
        s.nodes[active].freeze()
        try:
            await s.nodes.wait_for_active("wiki", other_than=active)
            assert not s.nodes[active].is_running
            assert not hidden.alive()
        finally:
            if hidden.alive():
                os.kill(hidden.pid, signal.SIGKILL)
