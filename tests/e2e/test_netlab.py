"""``phalanx.testing.netlab``: hosts on a switch, every kind of fault, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx.testing.netlab import NetLab, NetLabError


@pytest.fixture
def lab() -> Iterator[NetLab]:
    """Four hosts."""
    with NetLab(4) as lab:
        yield lab


def until(condition: Callable[[], bool], problem: str, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout:g} s: {problem}"
        time.sleep(0.02)


def seen(lab: NetLab) -> set[tuple[int, int]]:
    """Which pairs of hosts reach each other, as (smaller, larger)."""
    pairs = [(one, other) for one in lab for other in lab if one.index < other.index]
    return {(one.index, other.index) for one, other in pairs if one.reaches(other, timeout=0.15)}


def settles(lab: NetLab, pairs: set[tuple[int, int]]) -> None:
    """Those pairs of hosts reach each other, and no others: on a busy machine an answer may come too late."""
    until(lambda: seen(lab) == pairs, f"it is not {pairs}")


ALL = {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}


def test_hosts_that_nothing_disturbs(lab: NetLab) -> None:
    """Every host reaches every other one under the address that it names, and itself."""
    settles(lab, ALL)
    assert all(host.reaches(host) for host in lab)
    assert [host.address for host in lab] == ["10.66.0.11", "10.66.0.12", "10.66.0.13", "10.66.0.14"]
    assert all(host.addresses() == [host.address] for host in lab)


def test_host_and_the_machine(lab: NetLab) -> None:
    """A host sees none of the machine's interfaces, and the machine none of the lab's."""
    assert {line.split(":")[1].strip() for line in lab[0].ip("-o", "link").splitlines()} >= {"lo", "eth0@if3"}
    outside = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    assert "10.66.0." not in outside


def test_two_labs_of_the_same_subnet(lab: NetLab) -> None:
    """They do not meet: a port that is open in one is not in the other."""
    with NetLab(2) as other:
        for each in (lab, other):
            listening = each[0].socket()
            with listening:
                listening.bind((each[0].address, 80))
                listening.listen()
                absent = other if each is lab else lab
                with each[1].socket() as here, absent[1].socket() as there:
                    here.settimeout(10)
                    there.settimeout(10)
                    here.connect((each[0].address, 80))
                    with pytest.raises(ConnectionRefusedError):
                        there.connect((absent[0].address, 80))


def test_two_networks_and_ipv6() -> None:
    """A second network is an interface more; IPv6 works at once, without its second of waiting."""
    with NetLab(2, ipv6=True, networks=2) as lab:
        one, other = lab
        assert one.addresses("eth1") == ["10.66.1.11"]
        assert other.run(["ip", "-6", "route", "get", one.address6]).returncode == 0
        with one.socket(socket.AF_INET6) as listening, other.socket(socket.AF_INET6) as client:
            listening.bind((one.address6, 80))
            listening.listen()
            client.settimeout(10)
            client.connect((one.address6, 80))
        lab.cut_link(0)
        with one.socket() as listening, other.socket() as client:
            listening.bind(("10.66.1.11", 80))
            listening.listen()
            client.settimeout(10)
            client.connect(("10.66.1.11", 80))


# --- faults


def test_one_way(lab: NetLab) -> None:
    """What one host sends does not arrive at another one, which still reaches it, also after a while."""
    lab.drop(0, 1)
    assert (lab[0].delivers(lab[1]), lab[1].delivers(lab[0])) == (False, True)
    lab[1].ip("neigh", "flush", "all")
    assert (lab[0].delivers(lab[1]), lab[1].delivers(lab[0])) == (False, True)
    settles(lab, ALL - {(0, 1)})
    lab.allow(0, 1)
    settles(lab, ALL)


def test_both_ways(lab: NetLab) -> None:
    """Two hosts do not see each other, not even by ARP; the others see both."""
    lab.cut(0, 1)
    assert (lab[0].delivers(lab[1]), lab[1].delivers(lab[0])) == (False, False)
    settles(lab, ALL - {(0, 1)})
    lab[0].ip("neigh", "flush", "all")
    assert not lab[0].delivers(lab[1])
    entry = lab[0].ip("neigh", "show", lab[1].address)
    assert "lladdr" not in entry, entry
    lab.heal()
    until(lambda: seen(lab) == ALL, "not healed")


def test_one_port(lab: NetLab) -> None:
    """A connection to that port of that host is cut, in both directions, and nothing else."""
    with lab[0].socket() as listening, lab[0].socket() as other:
        for sock, port in ((listening, 80), (other, 81)):
            sock.bind((lab[0].address, port))
            sock.listen()
        lab.cut_port(1, 0, 80)
        assert lab.connected(1, 0)
        assert not lab.connected(1, 0, 80)
        for index, port, passes in ((1, 80, False), (1, 81, True), (2, 80, True)):
            with lab[index].socket() as client:
                client.settimeout(10.0 if passes else 0.3)
                try:
                    client.connect((lab[0].address, port))
                    connected = True
                except TimeoutError:
                    connected = False
                assert connected == passes, (index, port)


def test_isolated(lab: NetLab) -> None:
    """A host that the switch ignores keeps its carrier, and sees nobody."""
    lab.isolate(2)
    settles(lab, {(0, 1), (0, 3), (1, 3)})
    assert "LOWER_UP" in lab[2].ip("link", "show", "eth0")


def test_groups(lab: NetLab) -> None:
    """Only those of one group see each other, and who is in no group everybody."""
    lab.partition([0, 1], [2])
    settles(lab, ALL - {(0, 2), (1, 2)})
    lab.partition([0, 1], [2, 3])
    settles(lab, {(0, 1), (2, 3)})


def test_partition_and_an_address_that_a_host_took_since(lab: NetLab) -> None:
    """Faults hold for addresses that the lab does not know: those that hosts take for a service."""
    virtual = lab.address(100)
    lab[0].ip("addr", "add", f"{virtual}/24", "dev", "eth0")
    with lab[0].socket() as listening:
        listening.bind((virtual, 80))
        listening.listen()
        with lab[1].socket() as client:
            client.settimeout(10)
            client.connect((virtual, 80))
        lab.isolate(0)
        with lab[1].socket() as client:
            client.settimeout(0.2)
            with pytest.raises(OSError, match="timed out"):
                client.connect((virtual, 80))


def test_cable_pulled(lab: NetLab) -> None:
    """The host has no carrier but its address, and sees nobody until it is plugged in again."""
    lab.cut_link(3)
    assert "NO-CARRIER" in lab[3].ip("link", "show", "eth0")
    assert lab[3].addresses() == [lab[3].address]
    settles(lab, {(0, 1), (0, 2), (1, 2)})
    lab.restore_link(3)
    until(lambda: seen(lab) == ALL, "not healed")


def test_switch_gone(lab: NetLab) -> None:
    """Nobody sees anybody, with carrier; then all do."""
    lab.stop_switch()
    settles(lab, set())
    assert "LOWER_UP" in lab[2].ip("link", "show", "eth0")
    lab.start_switch()
    until(lambda: seen(lab) == ALL, "not healed")


def test_packets_lost(lab: NetLab) -> None:
    """About the share that was asked for, of this host alone."""
    assert lab[0].reaches(lab[1])  # so that ARP, which tries but once a second, is not what is lost
    lab.lose(0, 0.5)
    for sender, receiver in ((0, 1), (1, 0)):
        arrived = sum(lab[sender].delivers(lab[receiver], timeout=0.03) for _ in range(200))
        assert 60 < arrived < 140, (sender, receiver)
    assert all(lab[2].reaches(lab[1]) for _ in range(50))
    lab.heal()
    assert all(lab[0].reaches(lab[1]) for _ in range(50))


def test_flapping(lab: NetLab) -> None:
    """The link is seen down and up again and again, until it is healed."""
    lab.flap_link(1, up_seconds=0.3, down_seconds=0.1)
    for state in ("NO-CARRIER", "LOWER_UP") * 3:
        until(lambda: state in lab[1].ip("link", "show", "eth0"), f"never {state}")  # noqa: B023
    lab.heal()
    until(lambda: seen(lab) == ALL, "not healed")


def test_faults_of_all_kinds_at_once_and_heal(lab: NetLab) -> None:
    """``heal()`` ends them all."""
    lab.drop(0, 1)
    lab.partition([2], [3])
    lab.lose(0, 1.0)
    lab.cut_link(1)
    lab.cut_port(2, 3, 80)
    lab.stop_switch()
    assert not any(lab.connected(*pair) for pair in ALL)
    lab.start_switch()
    assert {pair for pair in ALL if lab.connected(*pair)} == set()
    lab.heal()
    assert all(lab.connected(*pair, 80) for pair in ALL)
    until(lambda: seen(lab) == ALL, "not healed")


def test_host_that_is_not_there(lab: NetLab) -> None:
    """A wrong number is an error, and changes nothing."""
    with pytest.raises(ValueError, match="no host 4 among 4"):
        lab.partition([0], [1, 4])
    with pytest.raises(ValueError, match="0 to 1, not 50"):
        lab.lose(0, 50)
    settles(lab, ALL)


# --- programs


def test_program_in_a_host(lab: NetLab, tmp_path: Path) -> None:
    """A web server in one host is read from others, by threads and by asyncio; 0 is no answer."""
    (tmp_path / "page").write_text("hello")
    command = [sys.executable, "-m", "http.server", "-d", str(tmp_path), "80"]
    process = lab[0].popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: lab[1].get(lab[0].address, 80, "/page") == (200, b"hello"), "no web server")
    assert lab[0].pids() == [process.pid]
    assert asyncio.run(lab[2].aget(lab[0].address, 80, "/nothing"))[0] == 404
    lab.cut(0, 1)
    assert lab[1].get(lab[0].address, 80, "/page") == (0, b"")


def test_asyncio_client_in_a_host(lab: NetLab) -> None:
    """A whole event loop runs in a host's thread; and a host's socket is used by a loop outside."""

    async def serve() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), lab[0].address, 70)
        async with server:
            with lab[1].socket() as client:
                client.setblocking(False)
                async with asyncio.timeout(2):
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(client, (lab[0].address, 70))
                    assert await loop.sock_recv(client, 10) == b""

    lab[0].call(asyncio.run, serve())


def test_program_that_fails(lab: NetLab) -> None:
    """``run`` says what failed and what it printed."""
    with pytest.raises(NetLabError, match="ended with 3: no good"):
        lab[0].run(["sh", "-c", "echo no good >&2; exit 3"])


# --- its end


def namespaces(prefix: str = f"phx-{os.getpid()}-") -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{prefix}*")]


def test_test_that_fails_in_a_lab() -> None:
    """Everything is removed after an exception, also a program that ignores SIGTERM or stands still."""
    started: list[subprocess.Popen[bytes]] = []

    def fail() -> int:
        with NetLab(2) as lab:
            started.append(
                lab[0].popen(["sh", "-c", "trap '' TERM; sleep 100 & wait"], start_new_session=True)
            )
            started.append(lab[1].popen(["sleep", "100"]))
            until(lambda: len(lab[0].pids()) == 2, "no child")
            child = next(pid for pid in lab[0].pids() if pid != started[0].pid)
            os.kill(started[1].pid, signal.SIGSTOP)
            lab.flap_link(0)
            raise LookupError(child)

    with pytest.raises(LookupError) as raised:
        fail()
    child = raised.value.args[0]
    assert [process.returncode for process in started] == [-9, -9]
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    assert namespaces() == []


def test_lab_whose_process_was_killed() -> None:
    """The next lab removes its namespaces and what runs in them, and leaves those of the living alone."""
    program = "\n".join(
        (
            "from phalanx.testing.netlab import NetLab",
            "lab = NetLab(2)",
            "lab.start()",
            "print(lab[0].popen(['sleep', '100']).pid, flush=True)",
            "input()",
        )
    )
    with NetLab(1) as living:
        dead = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with dead:
            assert dead.stdout is not None
            sleeping = int(dead.stdout.readline())
            assert len(namespaces(f"phx-{dead.pid}-")) == 3
            dead.kill()
        with NetLab(1):
            assert namespaces(f"phx-{dead.pid}-") == []
            until(lambda: not Path(f"/proc/{sleeping}").exists(), "its program still runs", 5)
        assert living[0].run(["true"]).returncode == 0
        assert (Path("/run/netns") / living.bridge).exists()


def test_machine_without_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said in one line, before anything is made."""

    def which(name: str) -> str | None:
        return None if name == "nft" else f"/sbin/{name}"

    monkeypatch.setattr(shutil, "which", which)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetLabError, match=r"need nft \(nftables\), root's rights"), NetLab(1):
        pass
    assert namespaces() == []
