"""What every fault is made of: whom it hits, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .host import Host

if TYPE_CHECKING:
    from .world import World

Undo = Callable[[], None]


def victim(world: World) -> Host:
    """Mostly the host of the active node: that is where promises break."""
    rng = world.rng
    if world.active and rng.random() < 0.65:
        return world.active[-1].node.host
    return rng.choice(world.hosts)


def nothing() -> None:
    """How a fault ends that is over at once."""
