"""What the texts of a container's declaration mean: published ports, mounts."""

from __future__ import annotations

import ipaddress
import posixpath
import re
from typing import NamedTuple

_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


class PublishedPort(NamedTuple):
    """A port of the container that the host gives. ``address``: of the host, empty for all."""

    address: str
    host: int
    container: int
    protocol: str

    @classmethod
    def parse(cls, text: str) -> PublishedPort:
        """``8080`` (the same on both sides), ``80:8080``, ``10.0.0.9:80:8080``, ``[::1]:80:8080``; ``/udp``.

        Raises ValueError, which says what is wrong.
        """
        ports, slash, protocol = text.partition("/")
        if slash and protocol not in ("tcp", "udp"):
            raise ValueError(f"no protocol {protocol!r}")
        rest, _, container = ports.rpartition(":")
        address, _, host = rest.rpartition(":")
        if address:
            try:
                address = str(ipaddress.ip_address(address.removeprefix("[").removesuffix("]")))
            except ValueError:
                raise ValueError(f"{address!r} is no IP address") from None
        return cls(address, _port(host or container), _port(container), protocol or "tcp")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= len(text) <= 5 or not 1 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is no port")
    return int(text)


class Mount(NamedTuple):
    """A folder of the host (``is_bind``), or a named volume, inside the container."""

    source: str
    target: str
    read_only: bool

    @property
    def is_bind(self) -> bool:
        """Whether the source is a path of the host."""
        return "/" in self.source

    @classmethod
    def parse(cls, text: str) -> Mount:
        """``source:target`` or ``source:target:ro``. Raises ValueError, which says what is wrong."""
        source, colon, rest = text.partition(":")
        target, _, option = rest.partition(":")
        if not colon or not source or not target:
            raise ValueError("neither source:target nor source:target:ro")
        if option not in ("", "ro", "rw"):
            raise ValueError(f"no option {option!r}")
        if not posixpath.isabs(target):
            raise ValueError(f"the target {target!r} is no absolute path")
        if "/" in source and not posixpath.isabs(source):
            raise ValueError(f"the source {source!r} is no absolute path")
        if "/" not in source and not _VOLUME_NAME.fullmatch(source):
            raise ValueError(f"{source!r} is no name of a volume")
        return cls(source, target, option == "ro")
