"""The answers of all instances to one broadcast, by node."""

from __future__ import annotations

import asyncio

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.messaging import call_wire as wire
from phalanx.messaging.leading import ASK_AGAIN_SECONDS, LeaderView
from phalanx.ports import Bus, Message, Subscription


class Gathering:
    """Those of one broadcast; ``answers``, by node. Under way at the leader of no epoch. End it with
    :meth:`close`."""

    epoch = None

    def __init__(self, bus: Bus, view: LeaderView) -> None:
        self._bus, self._view = bus, view
        self._subscription: Subscription | None = None
        self._changed = asyncio.Event()
        self.answers: dict[str, Message] = {}
        self.nobody = False
        """Whether no instance is there."""
        self.is_ended = False
        """Whether the client was closed meanwhile."""

    async def send(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        """Ask all of them. Raises BusError."""
        self._view.in_flight.add(self)
        inbox = self._bus.new_inbox()
        self._subscription = await self._bus.subscribe(inbox, self._on_answer, direct=True)
        self._bus.send(subject, data, headers, reply=inbox)

    def _on_answer(self, message: Message) -> None:
        if not message.data and message.headers.get("Status") == "503":
            self.nobody = True
        elif node := wire.answered_by(message.headers)[0]:
            self.answers.setdefault(node, message)
        self._changed.set()

    async def wait(self, deadline: float) -> frozenset[str]:
        """Wait until all have answered that should, until *deadline* (``system.now()``) at most. Which nodes
        should: those that run the app, as any instance knows; none: no instance has said so."""
        expected: frozenset[str] = frozenset()
        while not (self.nobody or self.is_ended) and (left := deadline - system.now()) > 0:
            if not expected and await self._view.ask(deadline):
                expected = self._view.nodes
            if expected and expected <= self.answers.keys():
                break
            self._changed.clear()
            if not (self.nobody or self.is_ended):
                await wait_at_most(self._changed, left if expected else min(left, ASK_AGAIN_SECONDS))
        return expected

    def end_soon(self) -> None:
        """A later epoch has begun: that is nothing to it."""

    def end_now(self) -> None:
        """The client is closed."""
        self.is_ended = True
        self._changed.set()

    async def close(self) -> None:
        """Take no more answers."""
        self._view.in_flight.discard(self)
        if self._subscription is not None:
            await self._subscription.unsubscribe()
