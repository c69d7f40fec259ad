"""The few netlink messages that keep an address on this host or take it away, and reset what hangs on it.

Only the standard library, so that the keeper stays small (pyroute2 would cost it 25 MB and 0.15 s). Formats:
rtnetlink(7), ``linux/if_addr.h``, sock_diag(7), ``linux/inet_diag.h``. Linux only; every call takes about a
millisecond, and may wait for the kernel's lock on the network configuration: not for an event loop.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

Address = IPv4Address | IPv6Address

_NETLINK_ROUTE, _NETLINK_SOCK_DIAG = 0, 4
_DONE, _ERROR = 3, 2
_REQUEST, _ACK, _DUMP, _REPLACE = 0x1, 0x4, 0x300, 0x100
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_CACHEINFO, _IFA_FLAGS, _IFA_PROTO = 1, 2, 3, 6, 8, 11
_IFA_F_PERMANENT = 0x80
_IFA_F_LASTING = 0x02 | 0x200
"""IFA_F_NODAD and IFA_F_NOPREFIXROUTE: what stays as it was said; the other flags are the kernel's."""

_DIAG_BY_FAMILY, _DIAG_DESTROY = 20, 21
_BYTECODE, _SOURCE_CONDITION = 1, 7
_TCP_CLOSABLE = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11, 12))
"""All states of ``net/tcp_states.h`` but LISTEN, which may be somebody else's, CLOSE and TIME_WAIT."""

_TIMEOUT_SECONDS = 1.0
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_ADDRESS_HEADER = struct.Struct("=BBBBI")
_DIAG_REQUEST = struct.Struct("=BBBBI")
_SOCKET_ID_BYTES = 48


class Present(NamedTuple):
    """An address as it is on an interface, which is given by its index.

    ``created``: 1/100 s since boot, its identity over changes of its lifetime. ``flags``: IFA_F_…
    ``protocol``: who has put it there, 0 where the kernel does not say.
    """

    interface: int
    address: Address
    prefix: int
    label: str
    created: int
    flags: int
    protocol: int = 0

    @property
    def permanent(self) -> bool:
        """Whether it has no lifetime."""
        return bool(self.flags & _IFA_F_PERMANENT)


class Withdrawn(NamedTuple):
    """``addresses`` that were taken away and ``connections`` reset; ``problem``: why not all of these."""

    addresses: int
    connections: int
    problem: str = ""


def find(address: Address) -> list[Present]:
    """Where this host has *address*, if anywhere. Raises OSError."""
    with _Socket(_NETLINK_ROUTE) as netlink:
        answers = netlink.dump(_GETADDR, _ADDRESS_HEADER.pack(_family(address), 0, 0, 0, 0))
        return [present for body in answers if (present := _present(body)).address == address]


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _present(body: bytes) -> Present:
    _, prefix, flags, _, index = _ADDRESS_HEADER.unpack_from(body)
    found = dict(_attributes(body[_ADDRESS_HEADER.size :]))
    # Of a point-to-point link the address is that of the other end.
    address = ip_address(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS])
    label = found.get(_IFA_LABEL, b"").rstrip(b"\0").decode(errors="replace")
    if _IFA_FLAGS in found:
        (flags,) = struct.unpack("=I", found[_IFA_FLAGS])
    created = struct.unpack("=4I", found[_IFA_CACHEINFO])[2] if _IFA_CACHEINFO in found else 0
    protocol = found[_IFA_PROTO][0] if found.get(_IFA_PROTO) else 0
    return Present(index, address, prefix, label, created, flags, protocol)


def remove(present: Present) -> None:
    """Take it away; one that is gone already is as good. Raises OSError."""
    with _Socket(_NETLINK_ROUTE) as netlink:
        problem = netlink.ask(_DELADDR, _naming(present))
    if problem not in (0, errno.EADDRNOTAVAIL, errno.ENODEV):
        raise OSError(problem, os.strerror(problem))


def prolong(present: Present, seconds: int) -> None:
    """Have it there for *seconds* from now. Raises OSError.

    The caller has just seen it: the kernel makes one that is not there.
    """
    # IPv6 as it was put there: this host's own connections avoid it.
    preferred = seconds if present.address.version == 4 else 0
    body = _naming(present)
    if present.label:
        body += _attribute(_IFA_LABEL, present.label.encode() + b"\0")
    if present.protocol:
        body += _attribute(_IFA_PROTO, bytes([present.protocol]))
    body += _attribute(_IFA_FLAGS, struct.pack("=I", present.flags & _IFA_F_LASTING))
    body += _attribute(_IFA_CACHEINFO, struct.pack("=4I", preferred, seconds, 0, 0))
    with _Socket(_NETLINK_ROUTE) as netlink:
        problem = netlink.ask(_NEWADDR, body, _REPLACE)
    if problem:
        raise OSError(problem, os.strerror(problem))


def _naming(present: Present) -> bytes:
    """What a request that is about it begins with."""
    packed = present.address.packed
    header = _ADDRESS_HEADER.pack(_family(present.address), present.prefix, 0, 0, present.interface)
    return header + _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)


def withdraw(address: Address, *, created: int = 0, label: str = "") -> Withdrawn:
    """Take *address* away from wherever this host has it with a lifetime, connections first; raises OSError.

    *created*: only the one that was put there then; else, *label*: only one with it. What is permanent is
    somebody else's. Nothing there: nothing to do. On return it has been seen to be gone.
    """
    connections, problem = 0, ""
    ours = _removable(address, created, label)
    if ours:
        try:
            connections = reset_connections(address)
        except OSError as error:
            problem = str(error.strerror or error)
    for present in ours:
        remove(present)
    if ours and _removable(address, created, label):
        raise OSError(errno.EBUSY, "it is still there")
    return Withdrawn(len(ours), connections, problem)


def _removable(address: Address, created: int, label: str) -> list[Present]:
    return [
        present
        for present in find(address)
        if not present.permanent
        and (present.created == created if created else not label or present.label == label)
    ]


def reset_connections(address: Address) -> int:
    """Reset every TCP connection of this host from *address*, while it is still here: how many there were.

    The other ends see a reset, instead of a silence that may last for hours. Raises OSError; of these
    EOPNOTSUPP: the kernel cannot (CONFIG_INET_DIAG_DESTROY).
    """
    # Of a program that listens for both families, IPv4 connections are among those of IPv6.
    families = (socket.AF_INET, socket.AF_INET6) if address.version == 4 else (socket.AF_INET6,)
    count = 0
    with _Socket(_NETLINK_SOCK_DIAG) as netlink:
        for family in families:
            request = _DIAG_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _TCP_CLOSABLE)
            only = _attribute(_BYTECODE, _from_address(address))
            found = list(netlink.dump(_DIAG_BY_FAMILY, request + bytes(_SOCKET_ID_BYTES) + only))
            for body in found:
                socket_id = body[4 : 4 + _SOCKET_ID_BYTES]
                problem = netlink.ask(_DIAG_DESTROY, request + socket_id)
                if problem not in (0, errno.ENOENT):
                    raise OSError(problem, os.strerror(problem))
                count += problem == 0
    return count


def _from_address(address: Address) -> bytes:
    """A program of inet_diag with one step: a socket's own address is this one, whatever its port."""
    condition = struct.pack("=BBHi", _family(address), address.max_prefixlen, 0, -1) + address.packed
    length = 4 + len(condition)
    return struct.pack("=BBH", _SOURCE_CONDITION, length, length + 4) + condition


class _Socket:
    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._number = 0

    def __enter__(self) -> _Socket:
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of all answers. Raises OSError."""
        self._send(kind, _REQUEST | _DUMP, body)
        while True:
            for answered, answer in self._receive():
                if answered == _DONE:
                    return
                if answered == _ERROR:
                    problem = -struct.unpack_from("=i", answer)[0]
                    raise OSError(problem, os.strerror(problem))
                yield answer

    def ask(self, kind: int, body: bytes, flags: int = 0) -> int:
        """Have something done: 0, or the number of the error."""
        self._send(kind, _REQUEST | _ACK | flags, body)
        while True:
            for answered, answer in self._receive():
                if answered == _ERROR:
                    return -struct.unpack_from("=i", answer)[0]

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._number += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._number, 0) + body)

    def _receive(self) -> Iterator[tuple[int, bytes]]:
        data = self._socket.recv(1 << 16)
        while len(data) >= _HEADER.size:
            length, kind, _flags, number, _pid = _HEADER.unpack_from(data)
            if number == self._number:
                yield kind, data[_HEADER.size : length]
            data = data[(length + 3) & ~3 :]


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
