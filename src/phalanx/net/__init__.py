"""Virtual addresses: netlink, and the announcements that tell the neighbours. Linux only."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx import config, ports


def make_addresses(
    app: str, declared: Sequence[config.VirtualIP], ttl_seconds: float
) -> ports.SectionAddresses:
    """The addresses of *app*. *ttl_seconds*: the session's TTL, by default their lifetime."""
    # Here and not above: pyroute2 takes 25 MB and 0.15 s, which nodes without addresses do not pay.
    from phalanx.net.addresses import Addresses

    return Addresses(app, declared, ttl_seconds)


__all__ = ["make_addresses"]
