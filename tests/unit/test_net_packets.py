"""ARP and neighbour discovery frames: what is built, and what is taken for a claim."""

from __future__ import annotations

import ipaddress

import pytest

from phalanx.net import packets

IP4, IP6 = ipaddress.ip_address("192.0.2.9"), ipaddress.ip_address("2001:db8::1:9")
MAC, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def test_arp_probe_says_nothing_of_its_sender() -> None:
    """RFC 5227, 2.1.1: sender 0.0.0.0, target the address, broadcast, 42 bytes."""
    expected = (
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 00000000 000000000000 c0000209"
    )
    assert packets.probe(IP4, MAC) == bytes.fromhex(expected.replace(" ", ""))


def test_arp_announcements_come_as_request_and_as_reply() -> None:
    """Sender and target are the address in both; the reply has our hardware address as its target too."""
    request, reply = packets.announcements(IP4, MAC)
    assert request[20:22] == b"\0\1"
    assert reply[20:22] == b"\0\2"
    for frame in (request, reply):
        assert frame[:6] == packets.BROADCAST
        assert frame[28:32] == frame[38:42] == IP4.packed
    assert reply[32:38] == MAC


def test_neighbour_solicitation_for_a_duplicate() -> None:
    """RFC 4862, 5.4.2: from ::, to the solicited-node group, hop limit 255, with a right checksum."""
    frame = packets.probe(IP6, MAC)
    assert frame[:6] == bytes.fromhex("3333ff010009")
    assert frame[21] == 255
    assert frame[22:38] == bytes(16)
    assert frame[38:54] == ipaddress.ip_address("ff02::1:ff01:9").packed
    assert checksum_is_right(frame)


def test_unsolicited_advertisement_overrides() -> None:
    """RFC 4861, 7.2.6: to all nodes, override set, solicited not, with our link-layer address."""
    (frame,) = packets.announcements(IP6, MAC)
    assert frame[38:54] == packets.ALL_NODES.packed
    assert frame[58] == 0x20
    assert packets.announcements(IP6, MAC, router=True)[0][58] == 0xA0
    assert frame[-6:] == MAC
    assert checksum_is_right(frame)


def checksum_is_right(frame: bytes) -> bool:
    """The sum over pseudo header and body, checksum included, is zero."""
    body = frame[54:]
    return packets._checksum(frame[22:54] + len(body).to_bytes(4, "big") + b"\0\0\0\x3a" + body) == 0


@pytest.mark.parametrize("ip", [IP4, IP6])
def test_claims_are_told_from_probes_and_from_everything_else(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """An announcement claims, a probe asks, one for another address is nothing to us, nor is half a frame."""
    assert packets.claim(packets.probe(ip, OTHER), ip) == packets.Claim(OTHER, asks=True)
    for frame in packets.announcements(ip, OTHER):
        assert packets.claim(frame, ip) == packets.Claim(OTHER)
        assert packets.claim(frame, ip + 1) is None
        for length in range(len(frame) - 8):
            assert packets.claim(frame[:length], ip) is None
    assert packets.claim(b"", ip) is None
    assert packets.claim(bytes(60), ip) is None


def test_advertisement_that_a_router_has_passed_on() -> None:
    """With another hop limit than 255 it is no claim: it comes from outside."""
    (frame,) = packets.announcements(IP6, OTHER)
    assert packets.claim(frame[:21] + b"\x40" + frame[22:], IP6) is None
