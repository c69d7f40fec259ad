"""On which interface of this host a declared address belongs, or what keeps it from there."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from phalanx.config import VirtualIP
from phalanx.errors import AddressError
from phalanx.net.kernel import Interface, Link, Network, is_ours
from phalanx.netlink import Present

_IPV6_SETTINGS = Path("/proc/sys/net/ipv6/conf")


def place(app: str, declared: VirtualIP, network: Network) -> Link:
    """The interface that *declared* belongs on. Raises AddressError (``prepare``)."""
    address = ipaddress.ip_interface(declared.address)
    _check_free(app, declared, address, network)
    link = _named(app, declared, network) if declared.interface else _only(app, declared, address, network)
    if address.version == 6 and not _has_ipv6(link.name):
        raise AddressError(
            app,
            declared.address,
            "prepare",
            f"IPv6 is disabled on {link.name}",
            f"sysctl -w net.ipv6.conf.{link.name}.disable_ipv6=0",
        )
    if not link.up:
        problem, remedy = f"the interface {link.name} is down", f"ip link set {link.name} up"
        raise AddressError(app, declared.address, "prepare", problem, remedy)
    if not link.carrier:
        problem = f"the interface {link.name} has no carrier"
        raise AddressError(app, declared.address, "prepare", problem, "look after its cable, or its peer")
    _check_network(app, declared, address, link, network)
    return link


def _named(app: str, declared: VirtualIP, network: Network) -> Link:
    if (link := network.link(declared.interface)) is not None:
        return link
    raise AddressError(
        app,
        declared.address,
        "prepare",
        f"there is no interface {declared.interface}",
        f"correct interface; there are {_listed([link.name for link in network.links])}",
    )


def _only(app: str, declared: VirtualIP, address: Interface, network: Network) -> Link:
    fitting = [
        link for link in network.links if any(address.ip in own for own in _networks(link, address, network))
    ]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        problem = f"no interface has an address in its network {address.network}"
        remedy = "correct the address, or give the right interface one of its own there"
    else:
        problem = f"{_listed([link.name for link in fitting])} have addresses in its network"
        remedy = f"name one of them: interface = {fitting[0].name!r}"
    raise AddressError(app, declared.address, "prepare", problem, remedy)


def _check_free(app: str, declared: VirtualIP, address: Interface, network: Network) -> None:
    for present in network.addresses:
        if present.address != address.ip or is_ours(present):
            continue
        name = next((link.name for link in network.links if link.index == present.interface), "?")
        raise AddressError(
            app,
            declared.address,
            "prepare",
            f"it is an address of this host already, on {name}, and not by Phalanx",
            f"remove it from the host's configuration, and now: ip addr del {declared.address} dev {name}",
        )


def _check_network(app: str, declared: VirtualIP, address: Interface, link: Link, network: Network) -> None:
    around = [own for own in _networks(link, address, network) if address.ip in own]
    if not around:
        there = [str(own) for own in _networks(link, address, network)]
        has = f"has {_listed(there)}" if there else f"has no IPv{address.version} address of its own"
        raise AddressError(
            app,
            declared.address,
            "prepare",
            f"outside the networks of {link.name}, which {has}",
            "correct the address or the interface",
        )
    # As a single host it takes part in whatever network there is.
    if address.network.prefixlen != address.max_prefixlen and address.network not in around:
        raise AddressError(
            app,
            declared.address,
            "prepare",
            f"the network there is {around[0]}",
            f"write {address.ip}/{around[0].prefixlen}",
        )


def _networks(
    link: Link, address: Interface, network: Network
) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks of the interface's own addresses, of the address's own kind."""
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for present in network.on(link):
        if _counts(present, address) and (own := _network_of(present)) not in found:
            found.append(own)
    return found


def _counts(present: Present, address: Interface) -> bool:
    return (
        present.address.version == address.version
        and present.address != address.ip
        and not is_ours(present)
        and (present.address.is_link_local == address.ip.is_link_local)
    )


def _network_of(present: Present) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(f"{present.address}/{present.prefix}", strict=False)


def _has_ipv6(interface: str) -> bool:
    try:
        return (_IPV6_SETTINGS / interface / "disable_ipv6").read_text().strip() == "0"
    except OSError:
        return False


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"
