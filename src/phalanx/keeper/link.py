"""The node, as its keeper has it: its process, the channel between them, and the end of either."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from phalanx import system
from phalanx.keeper import fencing, wire
from phalanx.keeper.renewing import Renewer


class NodeLink:
    """One node at a time. What one says or does that was let go of means nothing any more.

    *on_message* gets what the node says; *on_gone* is told when it has ended or reads no more: ``gone`` is
    the reason then, until it is let go of.
    """

    def __init__(
        self, node_pid: int, on_message: Callable[[wire.FromNode], None], on_gone: Callable[[], None]
    ) -> None:
        self.process = fencing.NodeProcess(node_pid)
        self.gone: str | None = None
        self._on_message, self._on_gone = on_message, on_gone
        self._transport: asyncio.WriteTransport | None = None
        self._channel: _Channel | None = None
        self._end_exit_watch: Callable[[], None] | None = None
        self._told, self._is_told = float("-inf"), False

    async def open(self, channel: socket.socket) -> None:
        """Begin with the node that has started this process."""
        self._channel = protocol = _Channel(self)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_accepted_socket(lambda: protocol, channel)
        self._watch_exit()

    def take_up(self, transport: asyncio.WriteTransport, pid: int) -> None:
        """From now on it is this one, the next life of the one that was let go of."""
        self.process = fencing.NodeProcess(pid, system.ProcessRef.of(pid))
        self._channel, self._transport = _Channel(self), transport
        self._told, self._is_told = float("-inf"), False
        transport.set_protocol(self._channel)
        self._watch_exit()

    def _watch_exit(self) -> None:
        self._end_exit_watch = system.watch_exit(
            self.process.pid, lambda: self._note_gone("the node's process ended")
        )

    def let_go(self, *, closes: bool = True) -> None:
        """What it says or does from now on means nothing. Unless this *closes* the channel, its end does that
        of one that lives on: until then it is none of our business."""
        if self._end_exit_watch is not None:
            self._end_exit_watch()
        transport, self._transport, self._end_exit_watch, self._channel = self._transport, None, None, None
        if transport is not None and closes:
            transport.close()
        self.gone = None

    def say(self, message: wire.FromKeeper) -> None:
        """Tell it; nobody hears it while there is no node."""
        if self._transport is not None and not wire.send(self._transport, message):
            self._note_gone("the node does not read")

    def tell_validity(self, renewer: Renewer) -> None:
        """Of a session that is valid: what is new of it."""
        if self._transport is None:
            return
        if renewer.holder.valid_until > self._told:
            self._told = renewer.holder.valid_until
            self.say(wire.ValidUntil(self._told, renewer.renewals))
        # After that: a node that goes on once it is established may use the session at once.
        if not self._is_told:
            self._is_told = True
            self.say(wire.Established())

    def _note_gone(self, reason: str) -> None:
        if self.gone is None:
            self.gone = reason
            self._on_gone()

    def on_line(self, channel: _Channel, line: bytes) -> None:
        """One line of the node; of one that has left it means nothing any more."""
        if channel is self._channel:
            self._on_message(wire.decode_from_node(line))

    def on_closed(self, channel: _Channel) -> None:
        """The node closed its end."""
        if channel is self._channel:
            self._note_gone("the node closed its channel")


class _Channel(asyncio.Protocol):
    def __init__(self, link: NodeLink) -> None:
        self._link, self._lines = link, wire.Lines()

    def data_received(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            self._link.on_line(self, line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.on_closed(self)


__all__ = ["NodeLink"]
