"""One node as it is seen from outside, and what several of them say about an app."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from phalanx.types import Member, NodeStatus, Role

NO_ANSWER = "the node does not answer"


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One node as it is seen from outside.

    ``is_live``: its session is not over. A node that died stays listed until it returns.
    ``member`` is None for a node that answers although the platform's bucket does not list it (yet);
    ``status`` is None for one that did not answer.
    """

    node: str
    is_live: bool
    member: Member | None = None
    status: NodeStatus | None = None

    @property
    def answers(self) -> bool:
        """Whether the node answered."""
        return self.status is not None

    @property
    def apps(self) -> tuple[str, ...]:
        """The names of the apps that it declares."""
        if self.status is not None:
            return tuple(app.name for app in self.status.apps)
        return self.member.apps if self.member is not None else ()


def silent(platform: str, view: NodeView) -> NodeStatus:
    """What is shown of a node that does not answer: what is known of it, and that it is silent."""
    member = view.member
    return NodeStatus(
        platform,
        view.node,
        member.version if member is not None else "",
        str(member.session) if member is not None else "",
        labels=member.labels if member is not None else {},
        problems=(NO_ANSWER if view.is_live else f"{NO_ANSWER}, its session is over",),
    )


def active_of(nodes: Iterable[NodeView], app: str, *roles: Role) -> tuple[str, int] | None:
    """The node that has one of *roles* for *app*, and its epoch; of two the one with the higher epoch."""
    found = [
        (status.epoch, view.node)
        for view in nodes
        if view.status is not None
        for status in view.status.apps
        if status.name == app and status.role in roles
    ]
    if not found:
        return None
    epoch, node = max(found)
    return node, epoch


__all__ = ["NO_ANSWER", "NodeView", "active_of", "silent"]
