"""The Protocols between layers. Adapters import these; nothing above an adapter imports NATS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any, Protocol

import msgspec


class Message(msgspec.Struct, frozen=True):
    """A core NATS message. ``headers`` is empty where there are none."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = {}
    reply: str = ""


class Record(msgspec.Struct, frozen=True):
    """A stored message: its subject in the stream, its sequence there, and what it holds.

    ``removed`` is true for a delete or purge marker, and for the marker a server writes when a TTL
    runs out. ``time`` is Unix seconds by the server's clock, for people only.
    """

    subject: str
    data: bytes
    revision: int
    headers: Mapping[str, str] = {}
    time: float = 0.0
    removed: bool = False


class Fence(msgspec.Struct, frozen=True):
    """A write under this fence is refused by the server unless *subject*'s last revision is *revision*."""

    subject: str
    revision: int


class Connection(StrEnum):
    """What can happen to a bus's connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    CLOSED = "closed"


class Subscription(Protocol):
    """A subscription that can be ended. Ending it twice is harmless."""

    async def unsubscribe(self) -> None: ...


class Bus(Protocol):
    """NATS, as the rest of Phalanx sees it.

    Every call has a deadline in seconds. ``BusTimeout`` means that the outcome is unknown;
    ``BusUnavailable`` that nothing was sent. Writes are never buffered while disconnected:
    a compare-and-set that arrives much later than it was decided could act on a world that is gone.
    """

    @property
    def is_connected(self) -> bool: ...

    @property
    def server_name(self) -> str:
        """The server this client is connected to at present, empty when it is not."""
        ...

    @property
    def max_payload(self) -> int: ...

    async def write(
        self,
        subject: str,
        data: bytes = b"",
        *,
        expect: int | None = None,
        fence: Fence | None = None,
        headers: Mapping[str, str] | None = None,
        ttl_seconds: float | None = None,
        timeout: float = 2.0,
    ) -> int:
        """Store one message and return its revision (stream sequence).

        *expect*: the subject's last revision must be this one (0: the subject must hold nothing).
        *fence*: the fenced subject must be at its revision. Both at once are one atomic batch.

        Raises WrongRevision (a refused *expect* or *fence*; ``subject`` names which when known),
        BusUnavailable, BusTimeout, BusError.
        """
        ...

    async def read(self, stream: str, subject: str, *, timeout: float = 2.0) -> Record | None:
        """The last record of *subject*, answered by the stream's leader. None if there is none."""
        ...

    async def snapshot(self, stream: str, subjects: str, *, timeout: float = 2.0) -> list[Record]:
        """The last record of every subject that matches, by direct get, in stream order.

        A replica may answer, so this can lag behind :meth:`read` by a moment.
        """
        ...

    async def publish(
        self, subject: str, data: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a core message. Raises BusUnavailable when not connected."""
        ...

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> Message:
        """Send a core request. Raises BusUnavailable when nobody listens, BusTimeout."""
        ...

    async def subscribe(
        self, subject: str, on_message: Callable[[Message], Awaitable[None] | None], *, queue: str = ""
    ) -> Subscription:
        """Call *on_message* for each message, in order. An exception in it is logged, never lost."""
        ...

    async def api(self, subject: str, request: Mapping[str, Any], *, timeout: float = 5.0) -> dict[str, Any]:
        """A JetStream API request (subject without ``$JS.API.``). Raises BusError with the server's code."""
        ...

    def on_connection(self, callback: Callable[[Connection], None]) -> Callable[[], None]:
        """Be told of connection changes; returns a function that ends this."""
        ...


class Clock(Protocol):
    """Seconds that pass at a steady rate, also while the machine sleeps. Never wall time."""

    def __call__(self) -> float: ...
