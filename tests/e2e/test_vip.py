"""Virtual addresses on real interfaces: taken, announced, verified, given back, by a node alone."""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
import time
from collections.abc import Callable, Generator, Iterator

import pytest
from tests.e2e.vip_lab import Holding, lifetime, listening, mac, send, until

from phalanx.net import packets
from phalanx.testing.netlab import NetLab

VIP, VIP6 = "10.66.0.100", "fd66:66::100"
DECLARED = [f"{VIP}/24", f"{VIP6}/64"]
LASTING = [{"address": address, "lifetime": 40} for address in DECLARED]
"""They are prolonged, and so looked at, every ten seconds."""


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[NetLab]:
    """Three hosts, with IPv6."""
    with NetLab(3, ipv6=True) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: NetLab) -> Iterator[NetLab]:
    """The same, as it was made."""
    yield shared_lab
    shared_lab.heal()
    for host in shared_lab:
        host.ip("link", "set", "eth0", "up")
        for address in (VIP, VIP6):
            if address in host.addresses():
                host.ip("addr", "del", f"{address}/{24 if '.' in address else 64}", "dev", "eth0")
        host.ip("neigh", "flush", "all")


@pytest.fixture
def hold(lab: NetLab) -> Iterator[Callable[..., Holding]]:
    """Starts holders: ``hold(host, declared)``."""
    with contextlib.ExitStack() as stack:

        def start(host: int, declared: object = DECLARED, **options: str) -> Holding:
            holding = Holding(lab[host], declared, **options)
            stack.callback(holding.close)
            return holding

        yield start


Hold = Callable[..., Holding]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_one_host_takes_and_releases(lab: NetLab, hold: Hold, loop: str) -> None:
    """Both are registered before they are there, have a lifetime and a label, and go with the release."""
    one = hold(0, loop=loop)
    one.must("check")
    one.must("acquire 7")
    registered = [said["resource"] for said in one.events("registered")]
    assert {r["details"]["address"] for r in registered} == set(DECLARED)
    assert all(r["kind"] == "vip" and r["epoch"] == 7 for r in registered)
    assert set(lab[0].addresses()) >= {VIP, VIP6}
    assert lifetime(lab[0], VIP) in (1, 2)
    assert lifetime(lab[0], VIP6) in (1, 2)
    label = next(r["details"]["label"] for r in registered if VIP in r["details"]["address"])
    assert label.startswith("eth0:phx")
    assert len(label) <= 15
    assert label in lab[0].ip("addr", "show", "eth0")
    one.must("release")
    assert not {VIP, VIP6} & set(lab[0].addresses())
    assert {said["id"] for said in one.events("unregistered")} == {r["id"] for r in registered}


def test_address_outlives_its_lifetime_while_the_session_is_valid(lab: NetLab, hold: Hold) -> None:
    """It is prolonged in time, again and again, and never lost."""
    one = hold(0)
    one.must("acquire 1")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        assert lifetime(lab[0], VIP) in (1, 2)
        assert lifetime(lab[0], VIP6) in (1, 2)
        time.sleep(0.1)
    assert not one.events("lost")


def test_address_is_not_put_there_after_the_session(lab: NetLab, hold: Hold) -> None:
    """A node that stood still while it was about to take it: another one may have it by now."""
    one = hold(0)
    one.must("session -1")
    assert "the session is over" in one.do("acquire 1")["error"]
    assert not {VIP, VIP6} & set(lab[0].addresses())
    assert len(one.events("unregistered")) == 2
    one.must("session 60")
    one.must("acquire 2")


def test_held_quietly(lab: NetLab, hold: Hold) -> None:
    """The kernel hears of it four times a lifetime, not more: what changes is only looked at."""
    one = hold(0)
    one.must("acquire 1")
    with lab[0].popen(["ip", "-o", "monitor", "address"], stdout=subprocess.PIPE, text=True) as monitor:
        time.sleep(2)
        lab[0].ip("addr", "add", "10.66.0.90/24", "dev", "eth0")
        lab[0].ip("addr", "del", "10.66.0.90/24", "dev", "eth0")
        time.sleep(1)
        monitor.kill()
        assert monitor.stdout is not None
        told = [line for line in monitor.stdout if VIP in line]
    assert 2 <= len(told) <= 8, told


@pytest.mark.alone
def test_session_over_the_kernel_removes_it(lab: NetLab, hold: Hold) -> None:
    """Nothing prolongs an address whose session is over: it goes, and that is noticed."""
    one = hold(0)
    one.must("acquire 1")
    one.must("session 0")
    began = time.monotonic()
    until(lambda: not {VIP, VIP6} & set(lab[0].addresses()), "it is still there", 5)
    assert time.monotonic() - began < 3.5
    assert one.event("lost")["step"] == "keep"


@pytest.mark.alone
def test_holder_killed_the_kernel_removes_it(lab: NetLab, hold: Hold) -> None:
    """With nobody left to prolong it, it is gone a second after its lifetime at most."""
    one = hold(0)
    one.must("acquire 1")
    one.process.kill()
    until(lambda: not {VIP, VIP6} & set(lab[0].addresses()), "it is still there", 3.5)


def test_left_overs_of_a_crashed_run_are_removed(lab: NetLab, hold: Hold) -> None:
    """The same address on another interface, and another address with our label, are gone after the take."""
    one = hold(0, [f"{VIP}/24"])
    one.must("acquire 1")
    label = one.events("registered")[0]["resource"]["details"]["label"]
    one.process.kill()
    old = ("valid_lft", "60", "preferred_lft", "60")
    lab[0].ip("addr", "add", "10.66.0.101/24", "dev", "eth0", "label", label, *old)
    lab[0].ip("addr", "change", f"{VIP}/24", "dev", "eth0", *old)
    two = hold(0, [f"{VIP}/24"])
    two.must("acquire 2")
    assert lab[0].addresses().count(VIP) == 1
    assert "10.66.0.101" not in lab[0].addresses()
    assert lifetime(lab[0], VIP) in (1, 2)


@pytest.mark.parametrize(("address", "length"), [(VIP, 24), (VIP6, 64)])
def test_address_of_another_host(lab: NetLab, hold: Hold, address: str, length: int) -> None:
    """Somebody else answers for it: an error that names its hardware address, and nothing was taken."""
    lab[1].ip("addr", "add", f"{address}/{length}", "dev", "eth0", *(["nodad"] if ":" in address else []))
    one = hold(0, [f"{address}/{length}"])
    failed = one.do("acquire 1")
    assert failed["step"] == "probe"
    assert mac(lab[1]) in failed["error"]
    assert address not in lab[0].addresses()
    assert len(one.events("unregistered")) == 1


def test_earlier_holder_is_waited_for(lab: NetLab, hold: Hold) -> None:
    """A host whose holder is dead answers until its lifetime is over: then, and not before, it is taken."""
    one, two = hold(0), hold(1)
    one.must("acquire 1")
    one.process.kill()
    two.tell("acquire 2")
    while two._answers.empty():
        assert not (set(lab[0].addresses()) & set(lab[1].addresses()) & {VIP, VIP6})
    assert not two.answer()["error"]
    assert set(lab[1].addresses()) >= {VIP, VIP6}


@pytest.mark.parametrize("address", [VIP, VIP6])
def test_announced_at_once_and_again(lab: NetLab, hold: Hold, address: str) -> None:
    """Neighbours hear it as often as declared, in both forms, and their tables change at the first one."""
    client, length = lab[2], 24 if ":" not in address else 64
    kind = packets.ETHERTYPE_IPV6 if ":" in address else packets.ETHERTYPE_ARP
    one = hold(0, [{"address": f"{address}/{length}", "announcements": 3, "announce_every": 0.1}])
    with listening(client, kind) as heard:
        one.must("acquire 1")

        def announced() -> list[float]:
            ip = ipaddress.ip_address(address)
            claims = [(at, packets.claim(frame, ip)) for at, frame in heard]
            return [at for at, claim in claims if claim is not None and not claim.asks]

        forms = 1 if ":" in address else 2
        until(lambda: len(announced()) >= 3 * forms, f"heard {heard}")
        time.sleep(0.3)
        assert len(announced()) == 3 * forms
    one.must("release")


def test_client_follows_from_one_host_to_the_next(lab: NetLab, hold: Hold) -> None:
    """A client that knows the first host's hardware address talks to the second as soon as it has it."""
    one, two, client = hold(0), hold(1), lab[2]
    one.must("acquire 1")
    for address in (VIP, VIP6):
        client.get(address, 9, "/")  # nobody listens there: refused, by a neighbour that is known now
        assert mac(lab[0]) in client.ip("neigh", "show", address)
    one.must("release")
    two.must("acquire 2")
    for address in (VIP, VIP6):
        until(lambda a=address: mac(lab[1]) in client.ip("neigh", "show", a), "the old one is still known")


def test_somebody_deletes_it(lab: NetLab, hold: Hold) -> None:
    """It is lost at once, with its reason: not when it is to be prolonged, every ten seconds here."""
    one = hold(0, LASTING)
    one.must("acquire 1")
    lab[0].ip("addr", "del", f"{VIP}/24", "dev", "eth0")
    lost = one.event("lost", timeout=5)
    assert "not on eth0 any more" in lost["error"]
    assert VIP in lost["error"]


def test_interface_goes_down_and_comes_back(lab: NetLab, hold: Hold) -> None:
    """What is held is lost at once, the node is no candidate meanwhile, and is one again after it."""
    one = hold(0, LASTING)
    one.must("acquire 1")
    lab[0].ip("link", "set", "eth0", "down")
    assert "down" in one.event("lost", timeout=5)["error"]
    until(lambda: any("eth0 is down" in said["text"] for said in one.events("problem")), "no problem is told")
    one.must("release")
    lab[0].ip("link", "set", "eth0", "up")
    lab[0].ip("addr", "replace", f"{lab[0].address6}/64", "dev", "eth0", "nodad")
    until(lambda: one.events("problem")[-1]["text"] == "", f"still: {one.said}")
    one.must("acquire 2")


def test_cable_is_out_for_long(lab: NetLab, hold: Hold) -> None:
    """Without carrier for a second it is lost."""
    one = hold(0)
    one.must("acquire 1")
    began = time.monotonic()
    lab.cut_link(0)
    assert "no carrier" in one.event("lost")["error"]
    assert time.monotonic() - began > 0.9


def test_cable_is_out_for_a_moment(lab: NetLab, hold: Hold) -> None:
    """It stays, and is announced anew when the carrier is back."""
    one = hold(0, [{"address": f"{VIP}/24", "announcements": 1}])
    one.must("acquire 1")
    with listening(lab[2], packets.ETHERTYPE_ARP) as heard:
        lab.cut_link(0)
        time.sleep(0.2)
        assert not heard
        lab.restore_link(0)
        until(lambda: heard, "not announced again")
    assert not one.events("lost")


@pytest.mark.parametrize("address", [VIP, VIP6])
def test_conflict_is_contested_once(lab: NetLab, hold: Hold, address: str) -> None:
    """The first claim of another host is answered by an announcement; at the second it is given up."""
    ip = ipaddress.ip_address(address)
    one = hold(0, [{"address": f"{address}/{64 if ip.version == 6 else 24}", "announcements": 1}])
    one.must("acquire 1")
    foreign = bytes.fromhex("020000000001")
    kind = packets.ETHERTYPE_IPV6 if ip.version == 6 else packets.ETHERTYPE_ARP
    with listening(lab[2], kind) as heard:
        send(lab[1], packets.announcements(ip, foreign)[0])
        own = bytes.fromhex(mac(lab[0]).replace(":", ""))
        until(lambda: any((c := packets.claim(f, ip)) and c.mac == own for _, f in heard), "not contested")
    assert not one.events("lost")
    send(lab[1], packets.announcements(ip, foreign)[0])
    assert "02:00:00:00:00:01" in one.event("lost")["error"]


@contextlib.contextmanager
def changed(lab: NetLab, *undo: str) -> Generator[None]:
    """Whatever was changed on the first host is undone by ``ip`` *undo*."""
    try:
        yield
    finally:
        lab[0].ip(*undo)


@pytest.mark.parametrize(
    ("declared", "problem", "remedy"),
    [
        ({"address": "10.66.0.100/24", "interface": "eth7"}, "there is no interface eth7", "eth0"),
        ({"address": "10.77.0.100/24", "interface": "eth0"}, "outside the networks of eth0", "10.66.0.0/24"),
        ({"address": "10.77.0.100/24"}, "no interface has an address in its network", "correct the address"),
        ({"address": "10.66.0.100/25"}, "the network there is 10.66.0.0/24", "write 10.66.0.100/24"),
        ({"address": "fd66:66::100/48"}, "the network there is fd66:66::/64", "write fd66:66::100/64"),
        ({"address": "fd77::1/64", "interface": "eth0"}, "outside the networks of eth0", "fd66:66::/64"),
        ({"address": "10.66.0.11/24"}, "an address of this host already, on eth0", "ip addr del"),
    ],
)
def test_refused_before_anything_is_made(
    lab: NetLab, hold: Hold, declared: dict[str, str], problem: str, remedy: str
) -> None:
    """Each has one clear line that says what is wrong and what would be right; the node is no candidate."""
    one = hold(0, [declared])
    failed = one.do("check")
    assert failed["step"] == "prepare"
    assert problem in failed["error"]
    assert remedy in failed["error"]
    assert "\n" not in failed["error"]
    assert problem in one.event("problem")["text"]


def test_interface_that_is_down_is_refused(lab: NetLab, hold: Hold) -> None:
    """The remedy is the command that switches it on."""
    with changed(lab, "link", "set", "eth0", "up"):
        lab[0].ip("link", "set", "eth0", "down")
        assert "ip link set eth0 up" in hold(0, [f"{VIP}/24"]).do("check")["error"]
    lab[0].ip("addr", "replace", f"{lab[0].address6}/64", "dev", "eth0", "nodad")


def test_two_interfaces_in_its_network(lab: NetLab, hold: Hold) -> None:
    """Which of them is meant has to be said."""
    lab[0].ip("link", "add", "other", "type", "veth", "peer", "name", "peer")
    with changed(lab, "link", "del", "other"):
        lab[0].ip("addr", "add", "10.66.0.90/24", "dev", "other")
        failed = hold(0, [f"{VIP}/24"]).do("check")
        assert "eth0 and other have addresses in its network" in failed["error"]
        assert "interface = 'eth0'" in failed["error"]


def test_ipv6_is_switched_off(lab: NetLab, hold: Hold) -> None:
    """The remedy is the setting."""
    lab[0].run(["sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=1"])
    try:
        failed = hold(0, [{"address": f"{VIP6}/64", "interface": "eth0"}]).do("check")
        assert "IPv6 is disabled on eth0" in failed["error"]
    finally:
        lab[0].run(["sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"])
        lab[0].ip("addr", "replace", f"{lab[0].address6}/64", "dev", "eth0", "nodad")
        lab[0].ip("addr", "replace", "fe80::b/64", "dev", "eth0", "nodad")
