"""The events of one app on one node: its durable consumers, and the fence of its leader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from phalanx import system
from phalanx.errors import BusTimeout, BusUnavailable, Fenced
from phalanx.messaging.event_consumer import EventConsumer
from phalanx.messaging.event_fence import EventFence
from phalanx.messaging.event_handlers import EventHandlers
from phalanx.messaging.event_publishing import FencedPublisher, Publisher
from phalanx.messaging.events import Events
from phalanx.names import Names
from phalanx.observe.metrics import EventCounts
from phalanx.ports import Bus, Fence, SectionCalls

log = logging.getLogger("phalanx.events")

DECLARE_SECONDS = 15.0
"""How long the making of a consumer is tried: without its meta leader JetStream makes none."""


class EventServer:
    """``open`` and ``close`` with the node; ``seal``, ``begin`` and ``end`` with the active section.

    *has_own*: whether the app has events of its own. *report* hears what operators should know.
    """

    def __init__(
        self,
        app: str,
        node: str,
        handlers: EventHandlers,
        bus: Bus,
        names: Names,
        report: Callable[[str, str], None],
        *,
        has_own: bool,
    ) -> None:
        self._app, self._bus, self._names, self.has_own = app, bus, names, has_own
        self.handlers = handlers
        self._fence = EventFence(bus, names, app, node)
        self._sealed: tuple[int, Fence] | None = None
        """The epoch that has sealed last on this node, and what its events carry."""
        self._consumers = [EventConsumer(handler, bus, names, report) for handler in handlers]
        self._shared = [c for c, handler in zip(self._consumers, handlers, strict=True) if handler.anywhere]
        self._in_section = [c for c in self._consumers if c not in self._shared]
        self._unfenced = Publisher(lambda: bus, names, app)
        self.public = Events(lambda: bus, names, app, lambda: self._unfenced)
        self._fenced: list[FencedPublisher] = []
        self._fenced_before = 0
        """Events that sections of this node have published which are over."""

    # --- with the node

    async def open(self, context: Any) -> None:
        """Make the consumers, and begin with those that every node shares. Raises BusError, EventError."""
        self.handlers.is_served = True
        for consumer in self._consumers:
            await _patiently(consumer)
        for consumer in self._shared:
            await consumer.begin(context)

    async def close(self) -> None:
        """End those that every node shares. The active section has ended before."""
        self.handlers.is_served = False
        await _end_all(self._shared, graceful=True)

    def counts(self) -> list[EventCounts]:
        """What became of events on this node."""
        found = [
            EventCounts(self._app, each.durable, 0, each.handled, each.failed, each.dead, each.lag)
            for each in self.handlers
        ]
        if self.has_own:
            found.append(EventCounts(self._app, published=self._unfenced.published + self._fenced_count))
        return found

    # --- with the section

    async def seal(self, epoch: int) -> None:
        """From now on no leader of an earlier epoch can publish its events. Raises Fenced, BusError."""
        self._sealed = (epoch, await self._fence.seal(epoch))

    @property
    def _fenced_count(self) -> int:
        return self._fenced_before + sum(each.published for each in self._fenced)

    def active(self, epoch: int) -> Events:
        """What the section of *epoch* publishes with."""
        publisher: FencedPublisher | None = None

        def fenced() -> Publisher:
            nonlocal publisher
            if publisher is None:
                # What a later reign of this very node has sealed lets none of an earlier one pass.
                if self._sealed is None or self._sealed[0] != epoch:
                    raise Fenced(self._app, epoch)
                sealed = self._sealed[1]
                publisher = FencedPublisher(self._bus, self._names, self._app, self._fence, sealed, epoch)
                self._fenced_before = self._fenced_count
                self._fenced = [publisher]
            return publisher

        return Events(lambda: self._bus, self._names, self._app, fenced)

    async def begin(self, epoch: int, active: Any) -> None:
        """Handle events in the section. Raises BusError."""
        for consumer in self._in_section:
            await consumer.begin(active)

    async def end(self, *, graceful: bool) -> None:
        """See SectionCalls. Raises HookFailed if a handler does not end."""
        await _end_all(self._in_section, graceful=graceful)


class SectionWork:
    """Calls and events of one app as its active section goes through them: begun and ended together."""

    def __init__(self, *parts: SectionCalls) -> None:
        self._parts = parts

    async def begin(self, epoch: int, active: Any) -> None:
        """See SectionCalls."""
        for part in self._parts:
            await part.begin(epoch, active)

    async def end(self, *, graceful: bool) -> None:
        """See SectionCalls. All of them are ended, whatever one of them raises."""
        await _all(*(part.end(graceful=graceful) for part in self._parts))


async def _end_all(consumers: list[EventConsumer], *, graceful: bool) -> None:
    await _all(*(consumer.end(graceful=graceful) for consumer in consumers))


async def _all(*work: Any) -> None:
    """Do all of *work* to its end; then raise what one of them has raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _patiently(consumer: EventConsumer) -> None:
    deadline = system.now() + DECLARE_SECONDS
    while True:
        try:
            return await consumer.declare()
        except (BusUnavailable, BusTimeout) as error:
            if system.now() >= deadline:
                raise
            log.info("%s; trying again", error)
        await asyncio.sleep(0.2)


__all__ = ["EventServer", "SectionWork"]
