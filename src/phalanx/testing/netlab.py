"""Hosts as Linux network namespaces on a bridge: real network faults on one machine. Needs root.

::

    with NetLab(hosts=5) as lab:
        server = lab[0].popen(["python3", "-m", "http.server", "80"])
        lab[1].get(lab[0].address, 80, "/")       # (200, b"…"), asked from the second host
        lab.cut_link(0)                           # its cable is pulled: eth0 has no carrier
        lab.drop(0, 1)                            # one way: nothing of host 0 reaches host 1
        lab.partition([0, 1, 2], [3, 4])          # groups that do not see each other
        lab.heal()

Each host has ``lo`` and ``eth0``; the bridge, a switch, lives in a namespace of its own, so nothing touches
the machine's network, and labs never meet, even of the same subnet. Faults are rules of *the switch*
(nftables, family bridge) and of its ports: they hold for every frame, so for ARP, IPv6, multicast and
virtual addresses too, and the hosts' own firewalls stay empty.

A lab ends with everything that runs in its hosts. What a killed process leaves behind (the namespaces
``phx-PID-…``, and whatever runs in them) is removed by the next lab. Several labs may run at once.
"""

from __future__ import annotations

import ipaddress
import itertools
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from phalanx.testing import namespaces
from phalanx.testing.namespaces import NetLabError
from phalanx.testing.netlab_host import Host, http_get

_NEIGHBOURS = ("ether type arp", "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }")

FIRST_HOST = 11
"""The number of the first host's address in its network."""

_numbers = itertools.count(1)

__all__ = ["Host", "NetLab", "NetLabError", "http_get"]


class NetLab:
    """*hosts* hosts, counted from 0 and named h1, h2, …, on the switch.

    *subnet*: IPv4, host i has its address 11 + i; others are free for virtual addresses (``address(100)``).
    *ipv6*: the same numbers in a unique local /64. *networks*: a second one gives each host ``eth1`` on a
    switch of its own (the next subnet), and so on. Raises NetLabError where labs cannot be had.
    """

    def __init__(
        self,
        hosts: int = 3,
        *,
        subnet: str = "10.66.0.0/24",
        ipv6: bool = False,
        networks: int = 1,
    ) -> None:
        self.network = ipaddress.IPv4Network(subnet)
        self.network6 = ipaddress.IPv6Network("fd66:66::/64") if ipv6 else None
        if not 1 <= hosts <= 64 or self.network.prefixlen > 24 or networks < 1:
            raise ValueError(f"a lab has 1 to 64 hosts in a /24 or larger, not {hosts} in {subnet}")
        self.networks = networks
        self._number = next(_numbers)
        self.bridge = self.namespace("br")
        """The namespace of the switch."""
        self.hosts = [self._host(i) for i in range(hosts)]
        self._drops: dict[tuple[int, int], bool] = {}  # sender and receiver → whether all frames
        self._ports: set[tuple[int, int, int]] = set()  # client, server, port
        self._loss: dict[int, float] = {}
        self._cut: set[tuple[int, int]] = set()
        self._stopped = False
        self._flaps: dict[int, tuple[threading.Event, threading.Thread]] = {}
        # Faults may come from several threads (flapping has its own).
        self._lock = threading.RLock()

    def _host(self, index: int) -> Host:
        name, number = f"h{index + 1}", FIRST_HOST + index
        address6 = self.address6(number) if self.network6 else ""
        return Host(index, name, self.namespace(name), self.address(number), address6)

    def namespace(self, name: str) -> str:
        """The name of a namespace of this lab, as ``ip netns exec`` knows it."""
        return namespaces.name(self._number, name)

    def address(self, number: int) -> str:
        """Address *number* of the subnet. Hosts have 11 and more, the rest is free."""
        return str(self.network[number])

    def address6(self, number: int) -> str:
        """Address *number* of the IPv6 network. Raises ValueError without one."""
        if self.network6 is None:
            raise ValueError("this lab has no IPv6: NetLab(ipv6=True)")
        return str(self.network6[number])

    def host(self, index: int) -> Host:
        """Host *index*, counted from 0."""
        return self.hosts[index]

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __len__(self) -> int:
        return len(self.hosts)

    # --- faults: frames that the switch drops

    def drop(self, sender: int, receiver: int, *, all_frames: bool = False) -> None:
        """One way: nothing that host *sender* sends arrives at host *receiver*. Carriers stay.

        ARP and neighbour discovery pass, as with a firewall or a route gone wrong: without them, the other
        way would fail as well after some seconds. With *all_frames* they are dropped too.
        """
        with self._lock:
            self._check(sender, receiver)
            self._drops[sender, receiver] = all_frames
            self._apply()

    def cut(self, one: int, other: int) -> None:
        """Both ways between two hosts. Carriers stay."""
        self.partition([one], [other])

    def isolate(self, index: int) -> None:
        """Host *index* and the others do not see each other; its carrier stays, as behind a broken switch."""
        self.partition([index], [host.index for host in self if host.index != index])

    def partition(self, *groups: Sequence[int]) -> None:
        """Only hosts of the same group see each other. Hosts in no group see everybody. Carriers stay."""
        with self._lock:
            self._check(*itertools.chain.from_iterable(groups))
            for one, other in itertools.permutations(groups, 2):
                self._drops.update(dict.fromkeys(itertools.product(one, other), True))
            self._apply()

    def cut_port(self, client: int, server: int, port: int) -> None:
        """Both ways, TCP from host *client* to that *port* of host *server* alone. Carriers stay."""
        with self._lock:
            self._check(client, server)
            self._ports.add((client, server, port))
            self._apply()

    def allow(self, one: int, other: int) -> None:
        """End what is dropped between two hosts, both ways."""
        with self._lock:
            self._drops.pop((one, other), None)
            self._drops.pop((other, one), None)
            self._apply()

    def lose(self, index: int, fraction: float) -> None:
        """*fraction* (0 to 1) of what host *index* sends, and the same of what it should get, is lost."""
        self._check(index)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"a fraction is from 0 to 1, not {fraction}")
        with self._lock:
            self._loss[index] = fraction
            self._apply()

    # --- faults: links

    def cut_link(self, index: int, *, network: int = 0) -> None:
        """Pull the cable of host *index*: no carrier, its interface is up without lower layer."""
        self._set_port(index, network, up=False)

    def restore_link(self, index: int, *, network: int = 0) -> None:
        """Plug it in again."""
        self._set_port(index, network, up=True)

    def flap_link(self, index: int, *, up_seconds: float = 0.5, down_seconds: float = 0.5) -> None:
        """The link of host *index* goes down and up, until ``heal()``."""
        if index in self._flaps:
            raise ValueError(f"the link of host {index} flaps already")
        stop = threading.Event()

        def flap() -> None:
            while not stop.is_set():
                self.cut_link(index)
                stop.wait(down_seconds)
                self.restore_link(index)
                stop.wait(up_seconds)

        thread = threading.Thread(target=flap, name=f"flap-{index}", daemon=True)
        self._flaps[index] = (stop, thread)
        thread.start()

    def stop_switch(self) -> None:
        """The switch forwards nothing any more; the hosts' carriers stay."""
        self._stopped = True
        for number in range(self.networks):
            namespaces.ip(self.bridge, "link", "set", f"br{number}", "down")

    def start_switch(self) -> None:
        """It forwards again."""
        self._stopped = False
        for number in range(self.networks):
            namespaces.ip(self.bridge, "link", "set", f"br{number}", "up")

    def heal(self) -> None:
        """End every fault."""
        self._stop_flapping()
        with self._lock:
            self._drops.clear()
            self._ports.clear()
            self._loss.clear()
            self._apply()
            for index, network in sorted(self._cut):
                self.restore_link(index, network=network)
        self.start_switch()

    def connected(self, one: int, other: int, port: int | None = None) -> bool:
        """Whether no fault is between two hosts, by what was asked for.

        *port*: nor between the first and that port of the other.
        """
        if one == other:
            return True
        with self._lock:
            ill = (
                {index for index, _ in self._cut} | set(self._flaps) | {i for i, f in self._loss.items() if f}
            )
            return not (
                self._stopped
                or ill & {one, other}
                or {(one, other), (other, one)} & set(self._drops)
                or (port is not None and (one, other, port) in self._ports)
            )

    def _stop_flapping(self) -> None:
        for stop, _ in self._flaps.values():
            stop.set()
        for _, thread in self._flaps.values():
            thread.join(namespaces.END_SECONDS)
        self._flaps.clear()

    def _set_port(self, index: int, network: int, *, up: bool) -> None:
        with self._lock:
            namespaces.ip(self.bridge, "link", "set", _port(index, network), "up" if up else "down")
            (self._cut.discard if up else self._cut.add)((index, network))

    def _check(self, *indexes: int) -> None:
        for index in indexes:
            if not 0 <= index < len(self.hosts):
                raise ValueError(f"no host {index} among {len(self.hosts)}")

    def _apply(self) -> None:
        """Give the switch all rules anew, in one transaction."""
        rules: list[str] = []
        ports = range(self.networks)
        for index, fraction in sorted(self._loss.items()):
            # In thousands; both directions are lost at this one place.
            lost = f"numgen random mod 1000 < {round(fraction * 1000)} drop" if fraction < 1 else "drop"
            rules += [f"{way} {_port(index, n)} {lost}" for way in ("iifname", "oifname") for n in ports]
        for (sender, receiver), all_frames in sorted(self._drops.items()):
            for frames in [f"iifname {_port(sender, n)} oifname {_port(receiver, n)}" for n in ports]:
                if not all_frames:
                    rules += [f"{frames} {neighbours} accept" for neighbours in _NEIGHBOURS]
                rules.append(f"{frames} drop")
        for client, server, port in sorted(self._ports):
            for one, other, ends in ((client, server, "dport"), (server, client, "sport")):
                rules += [
                    f"iifname {_port(one, n)} oifname {_port(other, n)} tcp {ends} {port} drop" for n in ports
                ]
        script = "".join(f"add rule bridge lab forward {rule}\n" for rule in rules)
        namespaces.nft(self.bridge, f"flush chain bridge lab forward\n{script}")

    # --- lifetime

    def start(self) -> None:
        """Make the hosts, five in about 0.3 s. Raises NetLabError."""
        namespaces.require()
        namespaces.remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill what runs in the hosts and remove everything. Harmless when done twice."""
        self._stop_flapping()
        for host in self.hosts:
            host.close()
        namespaces.delete(self.bridge)

    def _build(self) -> None:
        namespaces.add(self.bridge)
        for number in range(self.networks):
            bridge = f"br{number}"
            # Forwards at once; multicast is flooded, as a plain switch does.
            kind = ("type", "bridge", "forward_delay", "0", "stp_state", "0", "mcast_snooping", "0")
            namespaces.ip(self.bridge, "link", "add", bridge, *kind)
            namespaces.ip(self.bridge, "link", "set", bridge, "addrgenmode", "none", "up")
        namespaces.nft(
            self.bridge,
            "table bridge lab {\n chain forward { type filter hook forward priority 0; policy accept; }\n}\n",
        )
        for host in self.hosts:
            self._plug_in(host)

    def _plug_in(self, host: Host) -> None:
        namespaces.add(host.namespace)
        host.ip("link", "set", "lo", "up")
        for number in range(self.networks):
            port, interface = _port(host.index, number), f"eth{number}"
            peer = ("peer", "name", interface, "netns", host.namespace)
            namespaces.ip(self.bridge, "link", "add", port, "type", "veth", *peer)
            namespaces.ip(
                self.bridge, "link", "set", port, "addrgenmode", "none", "master", f"br{number}", "up"
            )
            host.ip("link", "set", interface, "addrgenmode", "none", "up")
            own = ipaddress.IPv4Address(host.address) + number * self.network.num_addresses
            broadcast = self.network.broadcast_address + number * self.network.num_addresses
            whole = f"{own}/{self.network.prefixlen}"
            host.ip("addr", "add", whole, "broadcast", str(broadcast), "dev", interface)
            # The kernel's own duplicate detection would make these unusable for their first second.
            host.ip("addr", "add", f"fe80::{FIRST_HOST + host.index:x}/64", "dev", interface, "nodad")
            if self.network6 and number == 0:
                host.ip("addr", "add", f"{host.address6}/64", "dev", interface, "nodad")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _port(index: int, network: int) -> str:
    return f"p{index + 1}n{network}"
