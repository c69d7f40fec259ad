"""What becomes of programs, and of the node itself, when the keeper has to see to it: real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx import system
from phalanx.keeper.fencing import Registry
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
