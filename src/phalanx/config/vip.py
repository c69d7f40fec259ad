"""What users declare of a virtual address."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, cast

import msgspec

from phalanx.config import rules, texts
from phalanx.config.aliases import MaybeSeconds, Seconds, default
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About
from phalanx.errors import ConfigError

LONGEST_INTERFACE = 15
"""Linux: IFNAMSIZ - 1."""


class AddressWithLength(msgspec.Struct, frozen=True):
    """An address of a host with the length of its network's prefix, in normal form."""

    @property
    def shape(self) -> str:
        return "`10.0.0.9/24` or `2001:db8::9/64`"

    def __call__(self, key: str, value: object) -> str:
        remedy = "write address/prefix length, such as 10.0.0.9/24"
        if not isinstance(value, str) or "/" not in value:
            raise ConfigError(key, value, "no address with a prefix length", remedy)
        try:
            found = ipaddress.ip_interface(value)
        except ValueError as error:
            raise ConfigError(key, value, str(error), remedy) from None
        address = found.ip
        if address.is_loopback or address.is_multicast or address.is_unspecified:
            raise ConfigError(key, value, "no address that a host can have", remedy)
        network = found.network
        if network.num_addresses > 2 and address == network.network_address:
            raise ConfigError(key, value, "the address of the network itself", "choose a host's address")
        if network.version == 4 and network.num_addresses > 2 and address == network.broadcast_address:
            raise ConfigError(key, value, "the broadcast address of its network", "choose a host's address")
        return str(found)


class InterfaceName(msgspec.Struct, frozen=True):
    """The name of a network interface."""

    @property
    def shape(self) -> str:
        return "interface name, such as `eth0`"

    def __call__(self, key: str, value: object) -> str:
        text = texts.one_line(key, value, "write the name of an interface, such as eth0")
        if not text:
            return ""
        if len(text) > LONGEST_INTERFACE or "/" in text or any(c.isspace() for c in text):
            problem = f"no interface can be called so (1 to {LONGEST_INTERFACE} characters, no / or space)"
            raise ConfigError(key, value, problem, "ip link shows the interfaces of this host")
        return text


class _Address(Declaration, frozen=True):
    address: Annotated[
        str,
        About("The address, with the prefix length of its network.", AddressWithLength()),
    ]


class VirtualIP(_Address, frozen=True, kw_only=True, tag="vip", tag_field="type"):
    """An address that is on the active node, and nowhere else. Needs CAP_NET_ADMIN and CAP_NET_RAW."""

    interface: Annotated[
        str,
        About(
            "The interface that takes it.",
            InterfaceName(),
            default="the one that has an address in the same network",
        ),
    ] = ""
    lifetime: Annotated[
        MaybeSeconds,
        About(
            "The kernel removes the address by itself when it is not confirmed for so long.",
            rules.Duration(1, 3600, optional=True),
            default="the session's TTL, in whole seconds",
            trade_off="Bounds how long a host whose Phalanx has died wholly goes on answering.",
        ),
    ] = default(None)
    announcements: Annotated[
        int, About("Gratuitous ARPs (or neighbour advertisements) after taking it.", rules.Whole(1, 100))
    ] = 5
    announce_every: Annotated[Seconds, About("Pause between them.", rules.Duration(0.01, 60))] = default(0.2)
    probe_timeout: Annotated[
        Seconds,
        About(
            "How long to ask whether somebody else has the address before taking it. 0: do not ask.",
            rules.Duration(0, 10),
            trade_off="Adds to every failover, as silence is the answer that is hoped for.",
        ),
    ] = default(0.05)


def vip_of(value: object) -> object:
    """Text is short for a table with nothing but ``address``; a table needs no ``type``."""
    if isinstance(value, str):
        return {"type": "vip", "address": value}
    if isinstance(value, Mapping):
        return {"type": "vip", **cast("Mapping[object, object]", value)}
    return value
