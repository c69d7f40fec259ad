"""Frames that ask for an address and announce it, as bytes: ARP (RFC 826, RFC 5227), neighbour discovery
(RFC 4861, RFC 4862). Whole Ethernet frames, header included."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0806, 0x86DD
BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1")

_ETHERNET_BYTES = 14
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_ARP = (1, 0x0800, 6, 4)
_ARP_REQUEST, _ARP_REPLY = 1, 2
_NOBODY4, _NO_MAC = b"\0" * 4, b"\0" * 6

_IPV6_BYTES = 40
_ICMPV6 = 58
SOLICITATION, ADVERTISEMENT = 135, 136
_TARGET_LINK_LAYER = 2
_ROUTER, _OVERRIDE = 0x80000000, 0x20000000


class Claim(NamedTuple):
    """A frame by which somebody says that it has, or wants, an address. ``asks``: it only probes for it."""

    mac: bytes
    asks: bool = False


def mac_text(mac: bytes) -> str:
    """``52:54:00:12:34:56``."""
    return mac.hex(":")


def probe(address: IPv4Address | IPv6Address, mac: bytes) -> bytes:
    """Does anybody have *address*? Says nothing of ours: no neighbour changes its tables for it."""
    if isinstance(address, IPv4Address):
        # RFC 5227, 2.1.1: sent from 0.0.0.0.
        return _arp(BROADCAST, mac, _ARP_REQUEST, mac, _NOBODY4, _NO_MAC, address.packed)
    # RFC 4862, 5.4.2: from the unspecified address, to the target's solicited-node multicast group.
    group = IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + address.packed[-3:])
    return _neighbour(mac, IPv6Address("::"), group, SOLICITATION, 0, address)


def announcements(address: IPv4Address | IPv6Address, mac: bytes, *, router: bool = False) -> list[bytes]:
    """*address* is at *mac* now: overrides what the neighbours knew. *router*: this host forwards (IPv6)."""
    if isinstance(address, IPv4Address):
        ours = address.packed
        # RFC 5227, 3: some neighbours heed only the request's form, some only the reply's.
        return [
            _arp(BROADCAST, mac, _ARP_REQUEST, mac, ours, _NO_MAC, ours),
            _arp(BROADCAST, mac, _ARP_REPLY, mac, ours, mac, ours),
        ]
    flags = _OVERRIDE | (_ROUTER if router else 0)
    option = struct.pack("!BB6s", _TARGET_LINK_LAYER, 1, mac)
    return [_neighbour(mac, address, ALL_NODES, ADVERTISEMENT, flags, address, option)]


def claim(frame: bytes, address: IPv4Address | IPv6Address) -> Claim | None:
    """Who claims *address* by this frame, if anybody does."""
    if isinstance(address, IPv4Address):
        return _arp_claim(frame, address.packed)
    return _neighbour_claim(frame, address.packed)


def _arp(
    to: bytes, mac: bytes, operation: int, sender: bytes, sender_ip: bytes, target: bytes, target_ip: bytes
) -> bytes:
    body = _ARP.pack(*_ETHERNET_ARP, operation, sender, sender_ip, target, target_ip)
    return to + mac + struct.pack("!H", ETHERTYPE_ARP) + body


def _arp_claim(frame: bytes, address: bytes) -> Claim | None:
    if len(frame) < _ETHERNET_BYTES + _ARP.size or frame[12:14] != struct.pack("!H", ETHERTYPE_ARP):
        return None
    *kind, operation, mac, sender_ip, _target, target_ip = _ARP.unpack_from(frame, _ETHERNET_BYTES)
    if tuple(kind) != _ETHERNET_ARP:
        return None
    if sender_ip == address:
        return Claim(mac)
    if operation == _ARP_REQUEST and sender_ip == _NOBODY4 and target_ip == address:
        return Claim(mac, asks=True)
    return None


def _neighbour(
    mac: bytes,
    source: IPv6Address,
    to: IPv6Address,
    kind: int,
    flags: int,
    target: IPv6Address,
    option: bytes = b"",
) -> bytes:
    body = struct.pack("!BBHI", kind, 0, 0, flags) + target.packed + option
    pseudo = source.packed + to.packed + struct.pack("!II", len(body), _ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    # Hop limit 255: nobody heeds one that a router has passed on.
    header = struct.pack("!IHBB", 6 << 28, len(body), _ICMPV6, 255) + source.packed + to.packed
    multicast = b"\x33\x33" + to.packed[-4:]
    return multicast + mac + struct.pack("!H", ETHERTYPE_IPV6) + header + body


def _neighbour_claim(frame: bytes, address: bytes) -> Claim | None:
    start = _ETHERNET_BYTES + _IPV6_BYTES
    if len(frame) < start + 24 or frame[12:14] != struct.pack("!H", ETHERTYPE_IPV6):
        return None
    next_header, hops, source = frame[20], frame[21], frame[22:38]
    kind, target = frame[start], frame[start + 8 : start + 24]
    if next_header != _ICMPV6 or hops != 255 or target != address:
        return None
    if kind == ADVERTISEMENT:
        return Claim(_link_layer_option(frame[start + 24 :]) or frame[6:12])
    if kind == SOLICITATION and source == bytes(16):
        return Claim(frame[6:12], asks=True)
    return None


def _link_layer_option(options: bytes) -> bytes:
    while len(options) >= 8 and options[1]:
        if options[0] == _TARGET_LINK_LAYER:
            return options[2:8]
        options = options[8 * options[1] :]
    return b""


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
