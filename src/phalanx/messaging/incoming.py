"""One call as it has come to an instance, and the subscriptions that bring it."""

from __future__ import annotations

import asyncio

from phalanx import system
from phalanx.messaging import call_wire as wire
from phalanx.messaging.stream_out import OutgoingStream
from phalanx.names import Names
from phalanx.ports import Message, Subscription


class IncomingCall(wire.CallHeader):
    """One request, as far as it is known without its body. ``epoch``: for the leader of that reign or a later
    one; None: for this very node, whatever it is."""

    __slots__ = (
        "_has_begun", "_is_cancelled", "content_type", "deadline", "expired", "message", "method",
        "node_route", "section", "slot", "stream", "task", "window",
    )  # fmt: skip

    def __init__(self, message: Message, *, to_leader: bool, node_route: bool) -> None:
        headers = message.headers
        super().__init__(headers.get(wire.CALL, ""))
        self.message, self.method = message, Names.last_token(message.subject)
        self.content_type = wire.content_type_of(headers)
        self.deadline = system.now() + self.timeout_seconds
        if to_leader and self.epoch is None:
            self.epoch = 0
        self.node_route = node_route
        self.expired = False
        """Whether it was cancelled because its deadline is over."""
        self.section = 0
        """The epoch of the section that it runs in; 0: in none."""
        said = headers.get(wire.STREAM, "")
        self.window = int(said[:9]) if said.isdecimal() else 0
        """How many items the caller takes at first; 0: it wants one answer."""
        self.stream: OutgoingStream | None = None
        self.slot = 0
        self.task: asyncio.Task[None] | None = None
        self._has_begun = self._is_cancelled = False

    def begin(self) -> None:
        """Its task runs. Raises CancelledError if it was cancelled before."""
        self._has_begun = True
        if self._is_cancelled:
            raise asyncio.CancelledError

    def cancel(self) -> None:
        """End it. A task that is cancelled before its first step would do nothing at all, and not answer."""
        self._is_cancelled = True
        if self._has_begun and self.task is not None:
            self.task.cancel()

    def check(self) -> None:
        """Raises CancelledError if it is to end, whatever its handler makes of that."""
        if self._is_cancelled:
            raise asyncio.CancelledError

    def expire(self) -> None:
        """End it, as nobody waits for it any more."""
        self.expired = True
        self.cancel()


class Together:
    """Several subscriptions that end as one."""

    def __init__(self, each: list[Subscription]) -> None:
        self._each = each

    async def unsubscribe(self) -> None:
        for each in self._each:
            await each.unsubscribe()

    async def drain(self, timeout: float) -> None:
        await asyncio.gather(*(each.drain(timeout) for each in self._each))
