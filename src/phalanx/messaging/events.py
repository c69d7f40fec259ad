"""Events, as programs see them: publishing and subscribing, of one app or of the whole platform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from phalanx.messaging.content import JSON
from phalanx.messaging.event_publishing import Publisher
from phalanx.messaging.event_reading import EventReader
from phalanx.names import Names
from phalanx.ports import Bus

T = TypeVar("T")

_WHATEVER: Any = Any


class Events:
    """The events of an app (``app.events``), those of the platform (``platform.events``), and the app's under
    one reign (``ctx.events``: its ``publish`` raises Fenced once another node leads)."""

    def __init__(
        self, bus: Callable[[], Bus], names: Names, app: str | None, publisher: Callable[[], Publisher]
    ) -> None:
        self._bus, self._names, self._app, self._publisher = bus, names, app, publisher

    @classmethod
    def over(cls, bus: Callable[[], Bus], names: Names, app: str | None) -> Events:
        """Those that are not fenced, over the connection that *bus* gives."""
        publisher = Publisher(bus, names, app)
        return cls(bus, names, app, lambda: publisher)

    async def publish(
        self,
        subject: str,
        data: object = None,
        *,
        key: str = "",
        message_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str = JSON,
        timeout: float = 5.0,
    ) -> int:
        """Publish one event; its sequence, once NATS has stored it.

        *subject*: tokens with dots between, such as ``user.created``. *key*: events of one key are handled in
        order, one at a time. *message_id*: two events with one id within two minutes are stored once, and
        both calls return the sequence of the first; made up if left out. *headers* reach the handler.
        *content_type*: ``application/json`` or ``application/msgpack``. *timeout*: seconds, up to 60, in
        which it is tried again through failovers of NATS, always under one id.

        Raises ConfigError and EventError for what cannot be published, BusUnavailable if it was not stored,
        BusTimeout if that is not known (publish it again with the same *message_id*); Fenced under a reign
        that is over.
        """
        return await self._publisher().publish(
            subject,
            data,
            key=key,
            message_id=message_id,
            headers=headers,
            content_type=content_type,
            timeout=timeout,
        )

    def subscribe(
        self,
        pattern: str = ">",
        type: type[T] = _WHATEVER,
        *,
        since: datetime | float | None = None,
        after: int | None = None,
    ) -> EventReader[T]:
        """Events as they come, for this reader alone: ``async for event in app.events.subscribe("user.*")``.

        *type*: of their data. *since*: first those that are stored from that time on (Unix seconds, or a
        datetime); *after*: those after that sequence (0: all); neither: only new ones. Nothing is
        acknowledged: what was read is not remembered anywhere. Raises ConfigError.
        """
        return EventReader(self._bus(), self._names, self._app, pattern, type, since, after)


__all__ = ["Events"]
