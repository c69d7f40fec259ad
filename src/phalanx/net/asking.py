"""Who else on the network has an address that is declared, asked before any node takes it."""

from __future__ import annotations

import asyncio
import ipaddress

from phalanx.config import VirtualIP
from phalanx.net import packets
from phalanx.net.kernel import Link, Network, is_ours
from phalanx.net.segment import Segment

ASK_SECONDS = 1.0
"""How long answers are waited for: as long as the three probes of RFC 5227 take at least."""

_PROBES = 3


def is_here(declared: VirtualIP, network: Network) -> bool:
    """Whether a node of this host has it now."""
    address = ipaddress.ip_interface(declared.address)
    return any(present.address == address.ip and is_ours(present) for present in network.addresses)


async def who_has(declared: VirtualIP, link: Link) -> tuple[str, ...]:
    """The hardware addresses of those who answer for it on *link*, after ASK_SECONDS. An interface without
    ARP has nobody. Raises OSError."""
    if not link.mac:
        return ()
    found: dict[str, None] = {}

    def on_claim(claim: packets.Claim) -> None:
        if not claim.asks:  # a node that is about to take it
            found[packets.mac_text(claim.mac)] = None

    segment = Segment(link.name, link.mac, ipaddress.ip_interface(declared.address).ip, on_claim)
    try:
        for _ in range(_PROBES):
            segment.probe()
            await asyncio.sleep(ASK_SECONDS / _PROBES)
    finally:
        segment.close()
    return tuple(found)
