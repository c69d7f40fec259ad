"""What node and keeper say to each other: one JSON object a line over a socket pair.

Both ends come from the same installation, started by the same process, so there is no version
negotiation; an unknown message is an error. The exception is a keeper that has outlived its node in a pause:
it is met over a socket in the node's folder by the next life, perhaps of another version. It says Hello
first; these two, and End, keep their form for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec

from phalanx.config import Logging, NatsOptions, restore_secrets, reveal_secrets
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.types import Resource, SessionId

VERSION = 1
"""Grows with every change after which a node and a keeper of different versions would not understand each
other."""

MAX_LINE_BYTES = 1 << 20
MAX_UNSENT_BYTES = 4 << 20


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Node to keeper, first: hold this session."""

    platform: str
    session: SessionId
    streams: StreamList
    timing: Timing
    nats: NatsOptions
    state_dir: str
    host: str
    logging: Logging | None = None


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Node to keeper: the event loop runs."""


class Register(msgspec.Struct, frozen=True, tag="register"):
    """Node to keeper: this is about to start. Wait for Registered before it does."""

    number: int
    resource: Resource


class Unregister(msgspec.Struct, frozen=True, tag="unregister"):
    """Node to keeper: this has ended."""

    id: str


class Streams(msgspec.Struct, frozen=True, tag="streams"):
    """Node to keeper: the list of session streams changed."""

    streams: StreamList


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Node to keeper: everything has ended; end the session and yourself."""

    reason: str


WITHDRAWN = 0.0
"""Instead of the moment of :class:`Extend`: nothing that was promised counts any more."""


class Extend(msgspec.Struct, frozen=True, tag="extend"):
    """Node to keeper: what runs of *app* may go on until *moment* (this machine's boot-time clock), also
    without the session: all who could follow have promised so."""

    app: str
    moment: float


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Node to keeper: these apps are led here and paused, so what of them can is to outlive the node, and
    their leader keys stay. Of *others*, which it runs too, nothing does."""

    apps: tuple[str, ...]
    others: tuple[str, ...] = ()


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Node to keeper: I end, and nothing of my own code is active any more. Go on with what is to be kept."""

    keep: Keep


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """The node's next life to a keeper that is alone: go on for me. *apps*: those that it can adopt.

    The others say how it would hold a session; where that differs from how the keeper does it is refused.
    """

    apps: tuple[str, ...]
    platform: str
    node: str
    timing: Timing
    nats: NatsOptions


class End(msgspec.Struct, frozen=True, tag="end"):
    """The node's next life to a keeper that is alone: end everything, and yourself. The form is fixed."""

    reason: str


class Established(msgspec.Struct, frozen=True, tag="established"):
    """Keeper to node: a majority took the session's first renewal."""


class ValidUntil(msgspec.Struct, frozen=True, tag="valid-until"):
    """Keeper to node: the session is valid until then, on this machine's boot-time clock."""

    moment: float
    renewals: int


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """Keeper to node: from now on I kill this when you cannot."""

    number: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Keeper to node: I can't take note of this, so it must not start. The session goes on."""

    number: int
    problem: str


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """Keeper to node: the session is over (or never came to be)."""

    reason: str


class Noted(msgspec.Struct, frozen=True, tag="noted"):
    """Keeper to node: something for the audit log, that is no reason to stop."""

    action: str
    reason: str


class Released(msgspec.Struct, frozen=True, tag="released"):
    """Keeper to node: the tombstones are written. ``complete``: by a majority."""

    complete: bool


class Left(msgspec.Struct, frozen=True, tag="left"):
    """Keeper to node: I go on alone. You may end."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A keeper that is alone to who comes: what I speak, and which session I hold. The form is fixed."""

    version: int
    session: SessionId


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """Keeper to node: I hold this session for you from now on, and these run."""

    session: SessionId
    resources: tuple[Resource, ...]


FromNode = Start | Beat | Register | Unregister | Streams | Release | Extend | Keep | Leave
FromVisitor = Attach | End
FromKeeper = Established | ValidUntil | Registered | Refused | Lost | Noted | Released | Left | Attached

# The socket pair is the one place where secrets travel in clear: nobody else can read it.
_encoder = msgspec.json.Encoder(enc_hook=reveal_secrets)
_from_node: msgspec.json.Decoder[FromNode] = msgspec.json.Decoder(FromNode, dec_hook=restore_secrets)
_from_visitor: msgspec.json.Decoder[FromVisitor] = msgspec.json.Decoder(FromVisitor, dec_hook=restore_secrets)
_from_keeper = msgspec.json.Decoder(FromKeeper)
_hello = msgspec.json.Decoder(Hello)


def encode(message: FromNode | FromVisitor | FromKeeper | Hello) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


class Lines:
    """Cuts a byte stream into lines. Raises ValueError when one exceeds MAX_LINE_BYTES."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The complete lines so far."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        yield from lines


def decode_from_node(line: bytes) -> FromNode:
    """A message of the node."""
    return _from_node.decode(line)


def decode_from_visitor(line: bytes) -> FromVisitor:
    """A message to a keeper that is alone."""
    return _from_visitor.decode(line)


def decode_hello(line: bytes) -> Hello:
    """What such a keeper says first, of whatever version."""
    return _hello.decode(line)


def decode_from_keeper(line: bytes) -> FromKeeper:
    """A message of the keeper."""
    return _from_keeper.decode(line)


def send(transport: asyncio.WriteTransport, message: FromNode | FromKeeper | Hello) -> bool:
    """Queue *message*; False if the other end is gone or has stopped reading for very long.

    Never blocks: the keeper must go on while the node stands still, and the other way round.
    """
    if transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
        return False
    transport.write(encode(message))
    return True
