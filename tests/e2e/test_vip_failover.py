"""Nodes with a virtual address on hosts of their own: who answers a client there, whatever happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator

import pytest

from phalanx.testing import faults
from phalanx.testing.vips import PORT, Answer, VipStage


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[VipStage]:
    """Two nodes with an IPv4 and an IPv6 address, TTL 2 s."""
    with VipStage(ipv6=True) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: VipStage) -> Iterator[VipStage]:
    """The same, with all nodes running and one of them active."""
    for host in shared_stage.lab:
        host.ip("link", "set", "eth0", "up")
        host.ip("addr", "replace", f"{host.address6}/64", "dev", "eth0", "nodad")
    for node in shared_stage.nodes.values():
        if not node.is_running:
            node.start()
    shared_stage.settled()
    yield shared_stage
    shared_stage.lab.heal()


class Watch:
    """Who answered the client at both addresses, and on which hosts they were, again and again."""

    def __init__(self, stage: VipStage) -> None:
        self._stage = stage
        self.answers: dict[str, list[Answer]] = {stage.vip: [], stage.vip6: []}
        self.holders: list[list[str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(a,)) for a in self.answers]
        self._threads.append(threading.Thread(target=self._look))

    def _ask(self, address: str) -> None:
        while not self._stop.wait(0.01):
            answer = self._stage.ask(address, timeout=0.2)
            if answer.node:
                self.answers[address].append(answer)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            for address in self.answers:
                self.holders.append(self._stage.holders(address))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._wait_answers(1)

    def _wait_answers(self, epochs: int) -> None:
        def heard() -> bool:
            return all(len({a.epoch for a in answers}) >= epochs for answers in self.answers.values())

        self._stage.wait_until(heard, f"{epochs} epochs did not answer at both addresses: {self.answers}")

    def finish(self) -> None:
        """Until another epoch has answered too."""
        self._wait_answers(2)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """The address was never on two hosts, and no answer of an epoch came after one of a later."""
        assert all(len(holders) < 2 for holders in self.holders)
        for answers in self.answers.values():
            epochs = [answer.epoch for answer in answers]
            assert epochs == sorted(epochs)


@contextlib.contextmanager
def watched(stage: VipStage) -> Generator[Watch]:
    """Watches until the end, and checks."""
    watch = Watch(stage)
    watch.start()
    try:
        yield watch
        watch.finish()
    finally:
        watch.stop()
    watch.check()


def moved(stage: VipStage, active: str, timeout: float = 30.0) -> str:
    """Wait until another node answers at both addresses."""
    other = stage.wait_for_active(other_than=active, timeout=timeout)
    stage.wait_until(lambda: stage.ask(stage.vip6).node == other, "IPv6 has not followed")
    return other


def test_sigkill_of_the_active_node_its_keeper_drops_the_addresses(stage: VipStage) -> None:
    """They are gone from its host before another takes them; the client never hears an old epoch again."""
    active = stage.settled()
    with watched(stage):
        stage.nodes[active].kill()
        moved(stage, active)
        assert stage.holders() == stage.holders(stage.vip6) == [stage.other(active)]
    log = stage.nodes[active].log()
    assert f"dropped the address {stage.vip} of" in log
    assert f"dropped the address {stage.vip6} of" in log


def test_planned_hand_over(stage: VipStage) -> None:
    """SIGTERM: they are released by the node itself, and follow to the next."""
    active = stage.settled()
    with watched(stage):
        stage.nodes[active].terminate()
        moved(stage, active)
    stage.nodes[active].wait(20)
    assert f"has given up {stage.vip}/24" in stage.nodes[active].log()


def kill_all(stage: VipStage, node: str) -> None:
    """SIGKILL everything on the node's host at the same moment, the warden too; the kernel lives."""
    pids = stage.host(node).pids()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    stage.nodes[node].wait(10)


def test_node_and_keeper_killed_at_once(stage: VipStage) -> None:
    """The warden drops the addresses before the session is over."""
    active = stage.settled()
    with watched(stage):
        stage.nodes[active].kill_both()
        stage.wait_until(lambda: not stage.holders(), "still there")
        moved(stage, active)
    log = stage.nodes[active].log().rpartition("the keeper died: killing what it has kept")[2]
    assert f"dropped the address {stage.vip} of" in log
    assert f"dropped the address {stage.vip6} of" in log


def test_node_keeper_and_warden_killed_at_once(stage: VipStage) -> None:
    """The kernel removes the addresses when their lifetime is over, and only then they are elsewhere."""
    active = stage.settled()
    with watched(stage):
        kill_all(stage, active)
        moved(stage, active)


def test_node_and_keeper_frozen_while_the_program_runs_on(stage: VipStage) -> None:
    """Its address goes by itself, so no client reaches a program of an old epoch, though it runs."""
    active = stage.settled()
    node = stage.nodes[active]
    with watched(stage):
        node.freeze(keeper=True)
        try:
            moved(stage, active)
            assert stage.host(active).get("127.0.0.1", PORT, "/")[0] == 200
        finally:
            node.thaw(keeper=True)
    node.wait(10)


def test_link_of_the_active_host_goes_down(stage: VipStage) -> None:
    """It stands down and says why it is no candidate; when the link is back it is a standby again."""
    active = stage.settled()
    with watched(stage):
        stage.host(active).ip("link", "set", "eth0", "down")
        moved(stage, active)
        stage.wait_until(lambda: not stage.holders() or stage.holders() != [active], "still there")
    stage.host(active).ip("link", "set", "eth0", "up")
    stage.host(active).ip("addr", "replace", f"{stage.host(active).address6}/64", "dev", "eth0", "nodad")
    stage.wait_until(lambda: stage.role(active) == "standby", "no standby again", 20)
    assert "eth0 is down" in stage.nodes[active].log()


def test_somebody_deletes_the_address_of_the_active_node(stage: VipStage) -> None:
    """The section fails with that reason, and the addresses are taken anew under another epoch."""
    active = stage.settled()
    before = stage.ask()
    stage.host(active).ip("addr", "del", f"{stage.vip}/24", "dev", "eth0")
    stage.wait_until(lambda: stage.ask().epoch > before.epoch, "nobody has taken it anew")
    log = stage.nodes[active].log()
    assert "section-failed" in log
    assert f"address {stage.vip}/24 keep: it " in log


def test_standbys_interface_is_missing(stage: VipStage) -> None:
    """A standby whose interface goes down is no candidate, and says so, while it is so."""
    standby = stage.other(stage.settled())
    stage.lab.cut_link(stage.names.index(standby))
    stage.wait_until(lambda: stage.role(standby) == "ineligible", "still a candidate", 10)
    assert "no carrier" in stage.status(standby)["reason"]
    stage.lab.restore_link(stage.names.index(standby))
    stage.wait_until(lambda: stage.role(standby) == "standby", "no standby again")


@pytest.mark.parametrize("way", ["planned", "killed"])
@pytest.mark.parametrize("path", ["/hold", "/fill"])
def test_old_connection_is_reset(stage: VipStage, way: str, path: str) -> None:
    """A client that only listens, or does not even read what is sent, learns of the end at once."""
    active = stage.settled()
    for address in (stage.vip, stage.vip6):
        with contextlib.ExitStack() as stack:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            client = stack.enter_context(stage.client.socket(family))
            client.settimeout(2)
            client.connect((address, PORT))
            client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            assert client.recv(100)
            if path == "/fill":
                time.sleep(0.1)  # until its buffers are full
            poll = select.poll()
            poll.register(client, select.POLLRDHUP if path == "/hold" else select.POLLERR)
            if way == "planned":
                stage.nodes[active].terminate()
            else:
                stage.nodes[active].kill()
            assert poll.poll(2000), "the client heard nothing"
        other = moved(stage, active)
        stage.nodes[active].wait(20)
        stage.nodes[active].start()
        stage.settled()
        active = other


def test_left_overs_of_node_and_keeper_are_dropped_by_the_next_keeper() -> None:
    """A node that is started again removes what its last life has left, long before its lifetime is over;
    the next holder waits for that."""
    with VipStage(vip={"lifetime": 60}) as stage:
        active = stage.settled()
        kill_all(stage, active)
        other = stage.other(active)
        stage.wait_until(lambda: "still answers for" in stage.nodes[other].log(), "it did not ask")
        assert stage.holders() == [active]
        stage.nodes[active].start()
        assert stage.wait_for_active(other_than=active) == other
        assert stage.holders() == [other]


def test_address_of_a_foreign_host() -> None:
    """No node becomes active, nothing is started, and the log names the host that has it."""
    with VipStage(start=False) as stage:
        stage.client.ip("addr", "add", f"{stage.vip}/24", "dev", "eth0")
        for node in stage.nodes.values():
            node.start()
        stage.wait_until(
            lambda: any("in use by another host" in node.log() for node in stage.nodes.values()), "not told"
        )
        assert stage.holders() == []
        for node in stage.names:
            assert stage.host(node).get("127.0.0.1", PORT, "/")[0] == 0


def test_bad_interface_nothing_is_started() -> None:
    """One line with the remedy, exit code 2."""
    with VipStage(1, vip={"interface": "eth9"}, start=False) as stage:
        stage.nodes["n1"].start()
        assert stage.nodes["n1"].wait(20) == 2
        log = stage.nodes["n1"].log()
        assert "there is no interface eth9; correct interface; there are lo and eth0" in log
        assert "listening" not in log


def test_without_rights_nothing_is_started() -> None:
    """Root without CAP_NET_RAW is told what it lacks."""
    with VipStage(1, start=False) as stage:
        node = stage.nodes["n1"]
        node.command = [*node.command[:3], "setpriv", "--bounding-set=-net_raw", "--", *node.command[3:]]
        node.start()
        assert node.wait(20) == 2
        assert "this process lacks CAP_NET_RAW; run it as root" in node.log()


def test_keeper_of_an_earlier_life_wakes_late(stage: VipStage) -> None:
    """It cannot take the address away from a newer section of the same node."""
    active = stage.settled()
    node = stage.nodes[active]
    keeper = node.keeper_pid
    standby = stage.other(active)
    faults.freeze(keeper)
    try:
        node.kill()
        moved(stage, active)
        node.start()
        stage.settled()
        stage.nodes[standby].terminate()
        stage.nodes[standby].wait(20)
        assert stage.wait_for_active(other_than=standby) == active
        before = stage.ask()
    finally:
        faults.thaw(keeper)
    stage.wait_until(lambda: not os.path.exists(f"/proc/{keeper}"), "the old keeper does not end", 30)
    assert stage.ask() == before
    assert "keep:" not in node.log().rpartition("has taken")[2]
