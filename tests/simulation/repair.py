"""The replacement of session streams, as ``coord.repair``: join, wait until all use both, settle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phalanx.decide.session import StreamList

from .nats import REFUSED, RPC_TIMEOUT, UNANSWERED

if TYPE_CHECKING:
    from .node import Node


class Repair:
    """One node's part in it."""

    def __init__(self, node: Node) -> None:
        self.node, self.host, self.world, self.nats = node, node.host, node.world, node.nats
        self.pending: tuple[StreamList, float] | None = None
        """The joint list to settle, and since when it is known here, on the clock of the host."""

    def replace(self, following: tuple[str, ...]) -> None:
        """First step of a replacement."""
        observer = self.node.watches.observer
        if observer is None or not self.node.session_valid() or observer.streams.is_joint:
            return
        now = observer.streams
        if self.world.rules.broken == "single-list-switch":
            then = StreamList(now.generation + 1, following)
        else:
            then = now.joint_with(following)
        self.nats.call(
            self.node,
            None,
            lambda: self.nats.use_streams(then, now.generation),
            RPC_TIMEOUT,
            self._joined,
            then,
        )

    def _joined(self, result: Any, streams: StreamList) -> None:
        if result is UNANSWERED or result is REFUSED:
            return
        self.node.watches.use_streams(streams)
        if streams.is_joint:
            self.pending = (streams, self.host.clock())

    def take_over(self) -> None:
        """A joint list that somebody left behind is brought to its end by whoever finds it."""
        watches = self.node.watches
        observer = watches.observer
        if observer is not None and observer.streams.is_joint and self.pending is None:
            self.pending = (observer.streams, self.host.clock())
            for name in observer.streams.all_streams:
                watches.ask(name, interrupted=False)

    def settle(self) -> None:
        """Second step, once all streams were read after the first and every live session uses both lists.

        Read after the first: a session that was made under the old list just before must be known here.
        """
        assert self.pending is not None
        joint, since = self.pending
        watches = self.node.watches
        observer = watches.observer
        if observer.streams.generation != joint.generation:
            self.pending = None
            return
        unread = [name for name in joint.all_streams if watches.caught_up.get(name, float("-inf")) < since]
        if unread:
            for name in unread:
                watches.ask(name, interrupted=False)
            return
        if any(observer.seen_generation(session) < joint.generation for session in observer.live()):
            return
        self.pending = None
        then = joint.settled()
        self.world.count("stream lists replaced")
        self.nats.call(
            self.node,
            None,
            lambda: self.nats.use_streams(then, joint.generation),
            RPC_TIMEOUT,
            self._settled,
            then,
        )

    def _settled(self, result: Any, streams: StreamList) -> None:
        if result is not UNANSWERED and result is not REFUSED:
            self.node.watches.use_streams(streams)
