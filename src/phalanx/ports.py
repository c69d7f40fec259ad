"""The Protocols between layers. Adapters import these; nothing above an adapter imports NATS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import msgspec

from phalanx.errors import AddressError
from phalanx.types import Health, ProgramStatus, Resource


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


STREAM_NOT_FOUND = 10059
"""The BusError code of a stream that does not exist (JSStreamNotFoundErr)."""


def is_removed(headers: Mapping[str, str]) -> bool:
    """Whether a stored message is a KV delete or purge, or the marker that a server writes at the end of
    a TTL (ADR-8, ADR-43)."""
    return "Nats-Marker-Reason" in headers or headers.get("KV-Operation") in ("DEL", "PURGE")


class Fence(msgspec.Struct, frozen=True):
    """A write under this fence is refused by the server unless *subject*'s last revision is *revision*."""

    subject: str
    revision: int


class Write(msgspec.Struct, frozen=True):
    """One message of an atomic batch. ``ttl_seconds`` counts in whole seconds, rounded up."""

    subject: str
    data: bytes = b""
    headers: Mapping[str, str] = {}
    ttl_seconds: float | None = None


MAX_BATCH = 1000
"""Messages of one atomic batch, and subjects of one :meth:`Bus.read_many`: the server's limits are 1000
(ADR-50) and 1024 (ADR-31)."""

BATCH_INCOMPLETE = 10176
BATCHES_UNDER_WAY = 10210
"""The BusUnavailable codes of a batch of which a part was lost (JSAtomicPublishIncompleteBatchErr), and of
one too many at a time on the stream (JSAtomicPublishTooManyInflight)."""


class Connection(StrEnum):
    """What can happen to a bus's connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    CLOSED = "closed"
    MISSED = "missed"
    """Still connected, but messages were lost on their way: a cut between servers that is over."""


class Subscription(Protocol):
    """A subscription that can be ended. Ending it twice is harmless."""

    async def unsubscribe(self) -> None: ...
    async def drain(self, timeout: float) -> None:
        """End it once all that the server has sent is taken, after *timeout* seconds at the latest. So of a
        queue group nothing is lost: what the server has not sent yet goes to another member."""
        ...


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

    async def write_many(
        self, writes: Sequence[Write], *, fence: Fence | None = None, timeout: float = 2.0
    ) -> int:
        """Store all of *writes* (1 to MAX_BATCH, each subject once) or none, in one atomic batch, and return
        the revision of the last; those of the others lie directly before it, in order.

        *fence*: as for :meth:`write`; its subject must not be among those written. *timeout* is for each
        answer of the server, of which there is one for every megabyte.

        Raises WrongRevision (the fence), BusUnavailable (nothing was stored, also when the connection broke
        before the last message), BusTimeout (only the last answer is missing), BusError.
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

    async def read_many(self, stream: str, subjects: Sequence[str], *, timeout: float = 2.0) -> list[Record]:
        """The last record of each of *subjects* (at most MAX_BATCH) that has one, in stream order: what one
        replica held at one moment. It can lag, see :meth:`snapshot`."""
        ...

    async def read_log(
        self,
        stream: str,
        subjects: str,
        *,
        start: int = 1,
        start_time: float | None = None,
        limit: int = 256,
        max_bytes: int | None = None,
        timeout: float = 2.0,
    ) -> list[Record]:
        """Up to *limit* records that match, in stream order, from sequence *start* on (or, if given, from
        *start_time*, Unix seconds), by direct get. An empty list: nothing there (yet).

        *max_bytes*: about how much the answer may hold; one record at least comes, however large it is.
        """
        ...

    async def publish(
        self, subject: str, data: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a core message. Raises BusUnavailable when not connected."""
        ...

    def send(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """What :meth:`publish` does, for whoever cannot wait. *reply*: one of :meth:`new_inbox`; nobody
        listens: a message with the header ``Status: 503`` comes there."""
        ...

    def new_inbox(self) -> str:
        """A subject that nobody else has, for answers."""
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

    async def gather(
        self,
        subject: str,
        data: bytes = b"",
        *,
        timeout: float = 1.0,
        most: int = 1024,
        is_last: Callable[[Message], bool] | None = None,
    ) -> list[Message]:
        """A core request with many answers: all that came within *timeout* seconds, at most *most*.

        *is_last* is told of each as it comes, and says whether that is all. Nobody listens: none, at once.
        """
        ...

    async def subscribe(
        self,
        subject: str,
        on_message: Callable[[Message], Awaitable[None] | None],
        *,
        queue: str = "",
        direct: bool = False,
    ) -> Subscription:
        """Call *on_message* for each message, in order. An exception in it is logged, never lost.

        *direct*: it is called as the message is read, before any other is; it must not be async then, nor
        take long.
        """
        ...

    async def api(self, subject: str, request: Mapping[str, Any], *, timeout: float = 5.0) -> dict[str, Any]:
        """A JetStream API request (subject without ``$JS.API.``). Raises BusError with the server's code."""
        ...

    def missed(self) -> None:
        """Somebody found that messages were lost: tells all listeners MISSED, at most once a second."""
        ...

    async def switch_server(self, why: str) -> None:
        """Leave the present server for another one of the list, although it answers."""
        ...

    def on_connection(self, callback: Callable[[Connection], None]) -> Callable[[], None]:
        """Be told of connection changes; returns a function that ends this."""
        ...


def _for_ever() -> float:
    return float("inf")


def _unheard(health: Health, detail: str) -> None: ...


class SectionContext(msgspec.Struct, frozen=True):
    """What a backend needs to know of the active section it runs for. ``database``: the path of the app's
    database, empty if it has none.

    ``register`` tells the keeper what is about to run and returns once it would be killed if this node
    died; ``unregister`` takes it back. Registering the same id again replaces the entry.
    ``session_left_seconds``: how long the node's session is valid still, as known now; 0 or less: it is not.
    ``on_health`` hears how the program is by a health check of its own, with what that said: it counts as a
    check of the app does.
    """

    platform: str
    node: str
    app: str
    epoch: int
    register: Callable[[Resource], Awaitable[None]]
    unregister: Callable[[str], None]
    database: str = ""
    session_left_seconds: Callable[[], float] = _for_ever
    on_health: Callable[[Health, str], None] = _unheard


class Running(Protocol):
    """One start of a backend, for one active section."""

    @property
    def ended(self) -> Awaitable[str]:
        """Done when the program has ended by itself; the result says how (``exited with code 3``)."""
        ...

    def status(self) -> ProgramStatus:
        """What it does now. Waits for nothing."""
        ...

    async def wait_ready(self) -> None:
        """Wait until it serves, by its ready check, for ``ready_timeout`` at most.

        Raises BackendError (step ``ready``); the caller kills it then.
        """
        ...

    async def stop(self, reason: str) -> None:
        """End it gracefully within the declared time, else by SIGKILL; returns when all of it is gone.

        Raises BackendError (step ``stop``) when processes do not die.
        """
        ...

    async def kill(self) -> None:
        """End it at once; returns when all of it is gone. Raises BackendError (step ``kill``)."""
        ...


class Backend(Protocol):
    """Any program that runs while an app is active on a node: a process, a unit, a container."""

    async def prepare(self, app: str) -> None:
        """Look whether *app*'s program could be started on this host; makes nothing.

        Raises BackendError (``prepare``).
        """
        ...

    async def start(self, section: SectionContext) -> Running:
        """Register, then start; it need not be ready. On any failure, cancellation too, nothing is left.

        What an earlier life of this node has left of the app is killed first (:meth:`fence`).
        Raises BackendError (step ``prepare`` or ``start``), SessionLost.
        """
        ...

    async def fence(self, app: str) -> list[str]:
        """Kill what runs of *app* on this host although nobody holds it, as far as this kind of backend can
        tell; what that was. Raises BackendError (step ``kill``) if something does not die."""
        ...

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """Take up what an earlier life of this node has left running and registered as *resource*: from now
        on it is as if started here. If it has ended meanwhile: None, or one whose ``ended`` says how. Raises
        BackendError. On None, an error or a cancellation nothing of it is left."""
        ...

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """The last *lines* (1 to 10,000) that its program wrote, oldest first. Raises BackendError."""
        ...


class AddressClaim(NamedTuple):
    """Other hosts, by their hardware addresses, answer for *address* on *interface*."""

    address: str
    interface: str
    macs: tuple[str, ...]


class SectionAddresses(Protocol):
    """The virtual addresses of an app, as its active section goes through them."""

    async def acquire(self, section: SectionContext, left: Sequence[Resource] = ()) -> None:
        """Take all of them: register, see that nobody else has them, add, announce. From then on they are
        verified and their lifetime is prolonged. Raises AddressError, SessionLost; then none is left.

        *left*: those that an earlier life of the node has left in a pause, and that are here: they go on as
        they are.
        """
        ...

    async def leave(self) -> None:
        """Let go of all of them as they are: the node ends in a pause, and its keeper prolongs them."""
        ...

    @property
    def lost(self) -> Awaitable[AddressError]:
        """Done when one of them is not here any more, or somebody else claims it (step ``keep``)."""
        ...

    async def release(self) -> None:
        """Give all of them up; returns when none is left. Raises AddressError (step ``release``)."""
        ...

    async def check(self) -> None:
        """Look whether this host could take them; makes nothing. Raises AddressError (``prepare``)."""
        ...

    async def claims(self) -> tuple[AddressClaim, ...]:
        """Which of them other hosts answer for just now, asked for a second; makes nothing. One that a node
        of this host has is not asked for. Raises AddressError (``prepare``)."""
        ...

    async def start(self, on_change: Callable[[], None]) -> None:
        """Follow what happens to their interfaces, until :meth:`close`; *on_change* is told whenever
        :meth:`ineligible_because` has another answer. Raises AddressError (``prepare``)."""
        ...

    def ineligible_because(self) -> str:
        """Why this node could not take them now (its interface is down or missing); empty if it could."""
        ...

    async def close(self) -> None:
        """Follow no more. Harmless without a start."""
        ...


class SectionDatabase(Protocol):
    """The database of an app, as its active section goes through it. Steps in the order of the methods."""

    async def seal(self, epoch: int) -> None:
        """Seal the log under *epoch* and apply it to the seal. Raises Fenced, DatabaseError, BusError."""
        ...

    async def promote(self) -> None:
        """Make the replica the live database, all or nothing. Raises DatabaseError."""
        ...

    async def start_capture(self, section: SectionContext) -> None:
        """See to it that no commit from now on escapes. Raises DatabaseError, BackendError, SessionLost."""
        ...

    async def wait_captured(self) -> None:
        """Wait until commits go into the log. If that fails, the section is ended, and this with it."""
        ...

    async def stop_capture(self, *, graceful: bool) -> str:
        """Undo all that was begun of these; nothing of it runs afterwards.

        *graceful*: what was committed goes into the log first, within a deadline. Returns what went wrong
        with that, empty if nothing. Not graceful: at once, and what is not in the log is dealt with later.
        """
        ...


class SectionEvents(Protocol):
    """The events of an app, as its active section goes through them."""

    async def seal(self, epoch: int) -> None:
        """From now on no leader of an earlier epoch can publish any. Raises Fenced, BusError."""
        ...


class SectionCalls(Protocol):
    """The calls that an app answers while it is active, as its active section goes through them."""

    async def begin(self, epoch: int, active: Any) -> None:
        """Answer from now on; *active* is what handlers get of the section. Raises BusError."""
        ...

    async def end(self, *, graceful: bool) -> None:
        """Begin no call any more, and return when none runs. *graceful*: those under way may end, within a
        deadline; else they are cancelled. Raises HookFailed if one does not end."""
        ...
