"""Virtual addresses: netlink, and the announcements that tell the neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx import config, ports
from phalanx.net.addresses import Addresses


def make_addresses(
    app: str, declared: Sequence[config.VirtualIP], ttl_seconds: float
) -> ports.SectionAddresses:
    """The addresses of *app*. *ttl_seconds*: the session's TTL, by default their lifetime."""
    return Addresses(app, declared, ttl_seconds)


__all__ = ["Addresses", "make_addresses"]
