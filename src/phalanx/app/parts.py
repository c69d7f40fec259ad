"""What an app needs of the node that runs it, as a port: the node is a layer above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from phalanx.coord.fencer import Fencer
from phalanx.coord.hold import Holds
from phalanx.names import Names
from phalanx.observe.journal import Journal
from phalanx.ports import Bus
from phalanx.types import Member, Pause, Resource


class NodeParts(Protocol):
    """What an app gets from its node."""

    @property
    def bus(self) -> Bus: ...
    @property
    def names(self) -> Names: ...
    @property
    def node(self) -> str: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def fencer(self) -> Fencer | None: ...
    @property
    def holds(self) -> Holds: ...
    @property
    def pauses(self) -> Mapping[str, Pause]: ...

    def live_members(self) -> dict[str, Member]: ...
    async def register(self, resource: Resource) -> None: ...
    def unregister(self, resource_id: str) -> None: ...
    def on_stuck(self, app: str, reason: str) -> None: ...
    def on_app_changed(self, app: str) -> None: ...
    def section_begins(self) -> None: ...
    def section_has_ended(self) -> None: ...


def instances_of(parts: NodeParts, app: str) -> Callable[[], tuple[str, ...]]:
    """Tells which nodes run *app*, and live, as this one knows them."""

    def instances() -> tuple[str, ...]:
        members = parts.live_members()
        return tuple(sorted({parts.node, *(node for node, each in members.items() if app in each.apps)}))

    return instances


__all__ = ["NodeParts", "instances_of"]
