"""A raw socket on one interface: asks the neighbours for an address, announces it, hears who else claims it.

Of all that passes the interface a filter in the kernel lets through only what concerns the address.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from phalanx.net import packets

log = logging.getLogger("phalanx.net")

_SO_ATTACH_FILTER = 26
_FRAMES_A_TURN = 32
_FRAME_BYTES = 256


class Segment:
    """One address on one interface. *on_claim* is told of frames from other hosts that claim the address.

    Opening it needs CAP_NET_RAW; raises OSError. :meth:`close` twice is harmless.
    """

    def __init__(
        self,
        interface: str,
        mac: bytes,
        address: IPv4Address | IPv6Address,
        on_claim: Callable[[packets.Claim], None],
    ) -> None:
        self._interface, self._mac, self._address = interface, mac, address
        self._on_claim = on_claim
        is_ipv4 = isinstance(address, IPv4Address)
        kind = packets.ETHERTYPE_ARP if is_ipv4 else packets.ETHERTYPE_IPV6
        # Protocol 0 hears nothing until it is bound, when the filter is there already.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.setblocking(False)
            _attach(self._socket, _arp_filter(address) if is_ipv4 else _NEIGHBOUR_FILTER)
            self._socket.bind((interface, kind))
        except OSError:
            self._socket.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)

    def use_mac(self, mac: bytes) -> None:
        """The interface has another hardware address now."""
        self._mac = mac

    def probe(self) -> None:
        """Ask once whether anybody has the address; who has it is told to *on_claim*."""
        self._send(packets.probe(self._address, self._mac))

    def announce(self, *, router: bool = False) -> None:
        """Tell the neighbours once that the address is here."""
        for frame in packets.announcements(self._address, self._mac, router=router):
            self._send(frame)

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame)
        except OSError as error:
            # A full queue or a link that is down just now: the next one may get through.
            log.debug("%s: cannot send for %s: %s", self._interface, self._address, error)

    def _read(self) -> None:
        for _ in range(_FRAMES_A_TURN):
            try:
                frame, origin = self._socket.recvfrom(_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:  # the interface went down, or away: netlink tells what follows
                log.debug("%s: %s", self._interface, error)
                return
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            found = packets.claim(frame, self._address)
            if found is not None and found.mac != self._mac:
                self._on_claim(found)

    def close(self) -> None:
        """Hear and say nothing more."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError, ValueError):
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()


# Classic BPF, linux/filter.h: (code, jump if true, jump if false, constant). It sees whole frames.

_LOAD_WORD, _LOAD_BYTE, _EQUALS, _RETURN = 0x20, 0x30, 0x15, 0x06
_ALL, _NOTHING = (_RETURN, 0, 0, _FRAME_BYTES), (_RETURN, 0, 0, 0)

_Instructions = tuple[tuple[int, int, int, int], ...]


def _arp_filter(address: IPv4Address | IPv6Address) -> _Instructions:
    """ARP whose sender or target is *address*."""
    ours = int(address)
    return (
        (_LOAD_WORD, 0, 0, 28),
        (_EQUALS, 2, 0, ours),
        (_LOAD_WORD, 0, 0, 38),
        (_EQUALS, 0, 1, ours),
        _ALL,
        _NOTHING,
    )


# Neighbour solicitations and advertisements; whose they are is compared outside, they are rare.
_NEIGHBOUR_FILTER: _Instructions = (
    (_LOAD_BYTE, 0, 0, 20),
    (_EQUALS, 0, 4, 58),
    (_LOAD_BYTE, 0, 0, 54),
    (_EQUALS, 1, 0, packets.SOLICITATION),
    (_EQUALS, 0, 1, packets.ADVERTISEMENT),
    _ALL,
    _NOTHING,
)


def _attach(to: socket.socket, instructions: _Instructions) -> None:
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    # struct sock_fprog: a length and, aligned as pointers are, where the instructions lie.
    to.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(instructions), ctypes.addressof(program))
    )
