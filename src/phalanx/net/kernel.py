"""What this host's network looks like, and how it changes: rtnetlink(7), by pyroute2.

The synchronous IPRoute, one for each call, in a thread: the asynchronous one of pyroute2 0.9 opens its socket
in a way that uvloop refuses, and keeps what it hears in a queue without bound. Events are read from a socket
of our own; they say only that one should look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import socket
import struct
from collections.abc import Callable, Generator
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from typing import NamedTuple

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from phalanx.netlink import Present

log = logging.getLogger("phalanx.net")

Interface = IPv4Interface | IPv6Interface
"""An address with the length of its network's prefix, as ``ipaddress`` calls it."""

LABEL = ":phx"
LONGEST_LABEL = 15

PROTOCOL = 80
"""IFA_PROTO of our addresses: who has put them there, where the kernel keeps it (since 5.18)."""

_UP, _LOOPBACK, _RUNNING, _NO_ARP = 0x1, 0x8, 0x40, 0x80
_NO_DAD, _NO_PREFIX_ROUTE = 0x02, 0x200

_LINK_GROUP, _IPV4_ADDRESS_GROUP, _IPV6_ADDRESS_GROUP = 0x1, 0x10, 0x100
_NEW_ADDRESS = 20
_EVENTS = (16, 17, _NEW_ADDRESS, 21)
_READS_A_TURN = 16


class Link(msgspec.Struct, frozen=True):
    """A network interface. ``mac`` is empty where neighbours are not asked (loopback, tunnels).

    ``up``: switched on. ``carrier``: something is at the other end of its cable.
    """

    index: int
    name: str
    mac: bytes
    up: bool
    carrier: bool


class Network(NamedTuple):
    """All interfaces and addresses of this host at one moment."""

    links: tuple[Link, ...]
    addresses: tuple[Present, ...]

    def link(self, name: str) -> Link | None:
        """The interface of this name."""
        return next((link for link in self.links if link.name == name), None)

    def on(self, link: Link) -> list[Present]:
        """The addresses of an interface."""
        return [present for present in self.addresses if present.interface == link.index]


def link(index: int) -> Link | None:
    """One interface, None if it is gone. Blocks; raises OSError."""
    try:
        with _errors(), IPRoute() as kernel:
            return next((_link(message) for message in kernel.get_links(index)), None)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def is_ours(present: Present) -> bool:
    """Whether some Phalanx node has put this address there. Others would give it no lifetime, or a label and
    a protocol of their own."""
    if present.permanent:
        return False
    # Kernels before 5.18 do not keep the protocol, and IPv6 has no labels.
    is_bare = present.address.version == 6 and bool(present.flags & _NO_DAD)
    return present.protocol == PROTOCOL or LABEL in present.label or (is_bare and not present.protocol)


def label_of(interface: str, owner: str) -> str:
    """The label of *owner*'s addresses on *interface*, empty where the kernel's 15 characters are too few.

    It begins with the interface's name, so that old tools show it; the rest tells owners apart.
    """
    room = LONGEST_LABEL - len(interface) - len(LABEL)
    if room < 2:
        return ""
    digest = hashlib.blake2s(owner.encode()).hexdigest()
    return f"{interface}{LABEL}{digest[: min(room, 6)]}"


def look() -> Network:
    """Ask the kernel. Blocks for some milliseconds; raises OSError."""
    with _errors(), IPRoute() as kernel:
        links = tuple(_link(message) for message in kernel.get_links())
        addresses = tuple(_present(message) for message in kernel.get_addr())
    return Network(links, addresses)


def _link(message: IPRoute.Message) -> Link:
    flags = int(message["flags"])
    mac = bytes.fromhex(str(message.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
    has_neighbours = not flags & (_LOOPBACK | _NO_ARP) and len(mac) == 6
    name = str(message.get_attr("IFLA_IFNAME"))
    return Link(
        int(message["index"]), name, mac if has_neighbours else b"", bool(flags & _UP), bool(flags & _RUNNING)
    )


def _present(message: IPRoute.Message) -> Present:
    address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    times = message.get_attr("IFA_CACHEINFO")
    return Present(
        int(message["index"]),
        ip_address(str(address)),
        int(message["prefixlen"]),
        str(message.get_attr("IFA_LABEL") or ""),
        int(times["cstamp"]) if times else 0,
        int(flags),
        int(message.get_attr("IFA_PROTO") or 0),
    )


def put(index: int, address: Interface, lifetime_seconds: int, label: str = "") -> None:
    """Have *address* on the interface *index* for *lifetime_seconds* from now, whether it is there or not.

    Blocks for a millisecond or so; raises OSError. An IPv6 address is not probed for (we have done so), and
    deprecated from the start: it serves, but this host's own connections do not go out from it, which would
    break when it moves. IPv4 chooses the interface's own address by itself.
    """
    wanted: dict[str, object] = {
        "index": index,
        "address": str(address.ip),
        "prefixlen": address.network.prefixlen,
        "proto": PROTOCOL,
    }
    preferred = lifetime_seconds
    if isinstance(address, IPv6Interface):
        wanted["flags"] = _NO_DAD | _NO_PREFIX_ROUTE
        preferred = 0
    else:
        if address.network.prefixlen < 31:
            wanted["broadcast"] = str(address.network.broadcast_address)
        if label:
            wanted["label"] = label
    wanted |= {"preferred": preferred, "valid": lifetime_seconds}
    with _errors(), IPRoute() as kernel:
        kernel.addr("replace", **wanted)


@contextlib.contextmanager
def _errors() -> Generator[None]:
    """pyroute2 raises errors of its own."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, str(error.args[1] if len(error.args) > 1 else error)) from error


class Change(NamedTuple):
    """Something has happened to an interface (its index; 0: to any, some news were lost).

    ``prolonged``: nothing but an address that has come, or whose lifetime was set anew.
    """

    interface: int
    prolonged: bool = False


class Changes:
    """Tells *on_change* what changes. Raises OSError when it cannot listen."""

    def __init__(self, on_change: Callable[[Change], None]) -> None:
        self._on_change = on_change
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            self._socket.setblocking(False)
            self._socket.bind((0, _LINK_GROUP | _IPV4_ADDRESS_GROUP | _IPV6_ADDRESS_GROUP))
        except OSError:
            self._socket.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)

    def _read(self) -> None:
        changed: set[Change] = set()
        for _ in range(_READS_A_TURN):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                # ENOBUFS: there was more than the kernel keeps for us.
                log.debug("netlink: %s", error)
                changed.add(Change(0))
                break
            changed |= _changed(data)
        for change in changed:
            self._on_change(change)

    def close(self) -> None:
        """Listen no more. Twice is harmless."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()


def _changed(data: bytes) -> set[Change]:
    found: set[Change] = set()
    while len(data) >= 24:
        length, kind = struct.unpack_from("=IH", data)
        if kind in _EVENTS:
            # Both headers, ifinfomsg and ifaddrmsg, have the interface's index 4 bytes in.
            found.add(Change(struct.unpack_from("=i", data, 16 + 4)[0], kind == _NEW_ADDRESS))
        data = data[max(16, (length + 3) & ~3) :]
    return found
