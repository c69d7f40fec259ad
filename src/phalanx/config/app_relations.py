"""What must fit together between the declarations of several apps: what a host has once is one app's.

Two apps that share a unit, a container or an address would end each other's, as each takes what it finds for
left-overs of its own; and the keeper, which knows a container by its id, would forget one of the two.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from phalanx.config.apps import ActivePassive, AppConfig
from phalanx.config.backends import Docker, Systemd
from phalanx.config.database_relations import between_databases
from phalanx.config.node import PlatformConfig
from phalanx.errors import ConfigError


def between_apps(apps: Sequence[AppConfig]) -> Iterator[ConfigError]:
    """What does not fit together between *apps*."""
    yield from between_databases(apps)
    owners: dict[object, str] = {}
    for app in apps:
        for what, key, value, thing in _alone(app):
            if (owner := owners.setdefault(what, app.name)) != app.name:
                problem = f"app {owner!r} has the same {thing}"
                yield ConfigError(key, value, problem, "give each app one of its own")


def with_platform(platform: PlatformConfig, app: AppConfig) -> Iterator[ConfigError]:
    """What of *app* the node does not have."""
    pattern = app.pattern
    if isinstance(pattern, ActivePassive) and pattern.on_nats_loss == "hold" and not platform.direct:
        yield ConfigError(
            f"apps.{app.name}.on_nats_loss",
            "hold",
            "the nodes cannot reach each other without NATS",
            "set direct (host:port) of the platform on every node, or write demote",
        )


def _alone(app: AppConfig) -> Iterator[tuple[object, str, str, str]]:
    """What *app* has to itself: by what it is told apart, its key, its value, and what it is called."""
    match app.backend:
        case Systemd(unit=unit):
            yield ("unit", unit), f"apps.{app.name}.backend.unit", unit, "unit"
        case Docker(container=container, socket=socket) if container:
            yield (
                ("container", socket, container),
                f"apps.{app.name}.backend.container",
                container,
                "container",
            )
        case _:
            pass
    for vip in app.vip:
        address = ipaddress.ip_interface(vip.address).ip
        yield ("address", address), f"apps.{app.name}.vip", vip.address, "address"
