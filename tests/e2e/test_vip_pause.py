"""A node with virtual addresses restarts in a pause: program and addresses stay, clients notice nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from phalanx.keeper import note
from phalanx.testing.vips import APP, Answer, VipStage

TTL = 2.0


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[VipStage]:
    """Two nodes with an IPv4 and an IPv6 address."""
    with VipStage(ipv6=True, ttl=TTL) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: VipStage) -> Iterator[VipStage]:
    """The same, all nodes running, nothing paused."""
    for node in shared_stage.nodes.values():
        if not node.is_running:
            node.start()
    shared_stage.settled()
    yield shared_stage
    operate(shared_stage, "resume")


def operate(stage: VipStage, what: str) -> None:
    """``phalanx pause`` or ``resume`` of the app, on the host of the first node."""
    toml = stage.directory / f"{stage.names[0]}.toml"
    command = stage.host(stage.names[0]).command(
        sys.executable, "-m", "phalanx.cli.main", what, APP, "--config", str(toml)
    )
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def paused(stage: VipStage) -> str:
    """The active node, whose keeper knows that it is paused."""
    active = stage.settled()
    operate(stage, "pause")
    stage.wait_until(lambda: note.read(stage.nodes[active].data_dir), "the keeper does not know of the pause")
    assert stage.status(active)["unkept"] == ""
    return active


class Watch:
    """What the client is answered at both addresses, on new connections, until told to stop."""

    def __init__(self, stage: VipStage) -> None:
        self._stage, self._stop = stage, threading.Event()
        self.answers: list[Answer] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(address,)) for address in (stage.vip, stage.vip6)
        ]

    def _ask(self, address: str) -> None:
        while not self._stop.wait(0.02):
            self.answers.append(self._stage.ask(address, timeout=2.0))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_g1_addresses_stay_while_the_node_restarts_in_a_pause(stage: VipStage, how: str) -> None:
    """For longer than the kernel's lifetime of them: the keeper prolongs it. Not one request fails."""
    active = paused(stage)
    node, first = stage.nodes[active], stage.ask()
    with Watch(stage) as watch:
        if how == "terminated":
            node.terminate()
            node.wait()
        else:
            node.kill()
        time.sleep(3 * TTL)
        assert stage.holders() == stage.holders(stage.vip6) == [active]
        node.start()
        stage.wait_until(lambda: stage.role(active) == "active", "it is not taken up")
        time.sleep(2 * TTL)
    assert set(watch.answers) == {first}
    assert len(watch.answers) > 100
    assert "has adopted" in node.log()
    assert "removed the left-over address" not in node.log()
    assert stage.ask() == first


def test_addresses_are_dropped_when_it_is_resumed_while_the_node_is_away(stage: VipStage) -> None:
    """By the keeper, and do not come back there; another node takes them."""
    active = paused(stage)
    stage.nodes[active].kill()
    time.sleep(TTL)
    operate(stage, "resume")
    other = stage.wait_for_active(other_than=active)
    assert stage.holders() == stage.holders(stage.vip6) == [other]
    time.sleep(1.0)
    assert stage.holders() == stage.holders(stage.vip6) == [other]


def test_addresses_go_with_the_keeper_that_is_killed_while_the_node_is_away(stage: VipStage) -> None:
    """Its warden drops them; the next life of the node waits for the end of the pause."""
    active = paused(stage)
    node = stage.nodes[active]
    node.kill_both()
    stage.wait_until(lambda: not stage.holders() and not stage.holders(stage.vip6), "they stay")
    assert not stage.ask().node
    node.start()
    stage.wait_until(lambda: stage.role(active) == "standby", "it does not come back")
    assert not stage.holders()
    operate(stage, "resume")
    stage.settled()
