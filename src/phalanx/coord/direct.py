"""What nodes say to each other without NATS: one datagram (UDP) a question, one an answer.

A datagram is 32 bytes of HMAC-SHA256 over the rest, under a secret that is kept in the platform's bucket,
and a JSON object. What is too long, not understood, not signed so, or not for this node, is ignored and
counted. That an answer is fresh its number says, which only its question knew; of questions a node answers
none twice (:class:`phalanx.decide.hold.Member`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import socket
from typing import Any, Protocol

import msgspec

from phalanx.decide.hold import Ask
from phalanx.errors import StartError
from phalanx.types import SessionId

log = logging.getLogger("phalanx.hold")

MAX_BYTES = 1200
"""A datagram fits into one packet of any network."""

_MAC_BYTES = hashlib.sha256().digest_size


class DirectSecret(msgspec.Struct, frozen=True):
    """The secret of a platform, in its bucket. ``key``: 32 random bytes in hex."""

    key: str

    @classmethod
    def new(cls) -> DirectSecret:
        """One that nobody has used before."""
        return cls(secrets.token_hex(32))


class Question(msgspec.Struct, frozen=True, tag="ask"):
    """*sender* asks node *to* for a promise."""

    platform: str
    sender: str
    to: str
    ask: Ask


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """What node *sender* says to question *number* of *session*: ``refusal`` is empty if it promises."""

    platform: str
    sender: str
    to: str
    app: str
    session: SessionId
    number: int
    refusal: str = ""


class Listener(Protocol):
    """Who is told of what comes. Both have to return at once."""

    def on_question(self, question: Question) -> str:
        """Why not; empty: it is promised."""
        ...

    def on_answer(self, answer: Answer) -> None:
        """To a question of this node."""
        ...


class Direct(asyncio.DatagramProtocol):
    """The end of one node. Use :meth:`start`, later :meth:`stop`."""

    def __init__(self, platform: str, node: str, secret: DirectSecret, listener: Listener) -> None:
        self._platform, self._node, self._key = platform, node, secret.key.encode()
        self._listener = listener
        self._transport: asyncio.DatagramTransport | None = None
        self.ignored = 0
        """Datagrams that were not understood, not signed, or for somebody else."""

    async def start(self, host: str, port: int) -> str:
        """Listen; returns ``host:port`` with the real port. Raises StartError."""
        loop = asyncio.get_running_loop()
        try:
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(host, port))
        except OSError as error:
            raise StartError(
                f"direct: cannot listen on {host}:{port} ({error.strerror or error})",
                "set direct to an address of this host and a port that nobody uses (UDP)",
            ) from error
        name: tuple[Any, ...] = self._transport.get_extra_info("sockname")
        return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"

    def stop(self) -> None:
        """No longer listen."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def ask(self, address: tuple[str, int], to: str, ask: Ask) -> None:
        """Send a question; whether it arrives nobody knows."""
        self._send(Question(self._platform, self._node, to, ask), address)

    def _send(self, message: Question | Answer, address: tuple[Any, ...]) -> None:
        data = msgspec.json.encode(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(self.sign(data) + data, address)

    def sign(self, data: bytes) -> bytes:
        """What has to stand before *data*."""
        return hmac.digest(self._key, data, "sha256")

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Anybody may have sent that."""
        message = self._read(data)
        if message is None:
            self.ignored += 1
            return
        if isinstance(message, Answer):
            self._listener.on_answer(message)
            return
        refusal, ask = self._listener.on_question(message), message.ask
        answer = Answer(self._platform, self._node, message.sender, ask.app, ask.session, ask.number, refusal)
        self._send(answer, addr)

    def _read(self, data: bytes) -> Question | Answer | None:
        if not _MAC_BYTES < len(data) <= MAX_BYTES:
            return None
        mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self.sign(body)):
            return None
        try:
            message = msgspec.json.decode(body, type=Question | Answer)
        except msgspec.MsgspecError:
            return None
        return message if (message.platform, message.to) == (self._platform, self._node) else None

    def error_received(self, exc: Exception) -> None:
        """Nobody listens there, or the network is down: asked again it is anyway."""
        log.debug("direct: %s", exc)


async def resolve(address: str) -> tuple[str, int] | None:
    """Where ``host:port`` is; None if it cannot be told now."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
    except (OSError, ValueError) as error:
        log.warning("direct: %s: %s", address, error)
        return None
    if not found:
        return None
    place = found[0][4]
    return str(place[0]), int(port)


__all__ = ["Answer", "Direct", "DirectSecret", "Listener", "Question", "resolve"]
