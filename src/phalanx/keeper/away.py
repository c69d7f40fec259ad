"""While the node is away in a pause: who may come for what runs on, and whether the pause is over."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from phalanx import unix_socket
from phalanx.aio import Background
from phalanx.decide.election import LeaderBody
from phalanx.decide.pause import WHOLE_PLATFORM
from phalanx.errors import BusError
from phalanx.keeper import note, wire
from phalanx.names import LEADER_KEY, Names
from phalanx.ports import Bus
from phalanx.types import SessionId

log = logging.getLogger("phalanx.keeper")

LOOK_SECONDS = 0.25
"""Between looks at the pauses: nobody tells a keeper of them."""

OnVisit = Callable[[asyncio.WriteTransport, int, wire.FromVisitor], None]
Visit = tuple[asyncio.WriteTransport, int, wire.FromVisitor]


class Door:
    """Where the node's next life knocks; *on_visit* gets its transport, its pid, and what it wants."""

    def __init__(self, session: SessionId, on_visit: OnVisit) -> None:
        self._session, self._on_visit = session, on_visit
        self._server: asyncio.AbstractServer | None = None

    async def open(self, state_dir: Path) -> None:
        """Begin to listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        listening = note.listen(state_dir)
        self._server = await loop.create_unix_server(self._visitor, sock=listening)

    def close(self) -> None:
        """No longer listen; who is in already stays."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _visitor(self) -> asyncio.Protocol:
        return _Visitor(self._session, self._on_visit)


class _Visitor(asyncio.Protocol):
    def __init__(self, session: SessionId, on_visit: OnVisit) -> None:
        self._session, self._on_visit, self._lines = session, on_visit, wire.Lines()
        self._transport: asyncio.WriteTransport | None = None
        self._pid = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        channel: socket.socket = transport.get_extra_info("socket")
        self._pid, user = unix_socket.peer(channel)
        if user not in (os.getuid(), 0):
            log.error("a process of user %d came to take over: refused", user)
            transport.abort()
            return
        wire.send(transport, wire.Hello(wire.VERSION, self._session))

    def data_received(self, data: bytes) -> None:
        try:
            for line in self._lines.feed(data):
                if self._transport is not None and not self._transport.is_closing():
                    self._on_visit(self._transport, self._pid, wire.decode_from_visitor(line))
        except (ValueError, msgspec.MsgspecError) as error:
            log.error("who came to take over is not understood: %s", error)
            if self._transport is not None:
                self._transport.abort()


async def resumed(bus: Bus, names: Names, apps: Collection[str]) -> set[str]:
    """Those of *apps* that are not paused any more. Raises BusError: then they stay what they were."""
    bucket = names.platform_bucket
    stream = names.bucket_stream(bucket)

    async def is_paused(app: str) -> bool:
        record = await bus.read(stream, names.key_subject(bucket, names.pause_key(app)))
        return record is not None and not record.removed

    if await is_paused(WHOLE_PLATFORM):
        return set()
    return {app for app in apps if not await is_paused(app)}


async def release_key(bus: Bus, names: Names, app: str, session: SessionId) -> None:
    """Give *app*'s leader key back, if it names *session*. Nothing of it may run. Raises BusError."""
    bucket = names.app_bucket(app)
    subject = names.key_subject(bucket, LEADER_KEY)
    record = await bus.read(names.bucket_stream(bucket), subject)
    if record is None or record.removed:
        return
    held = msgspec.json.decode(record.data, type=LeaderBody)
    if held.session != session:
        return
    reason, nonce = "its node has ended", secrets.token_hex(8)
    body = LeaderBody(reason=reason, nonce=nonce, unfenced=held.unfenced)
    await bus.write(subject, msgspec.json.encode(body), expect=record.revision)
    log.warning("app %s: its leader key was given back, its node has ended", app)


async def look_after(
    bus: Bus,
    names: Names,
    session: SessionId,
    kept: Collection[str],
    ended: Collection[str],
    on_resumed: Callable[[set[str]], None],
) -> None:
    """Until cancelled: give back the keys of what has *ended*, and tell when one of *kept* is resumed.

    Again and again: what the node sent last may be stored only now.
    """
    while True:
        try:
            for app in list(ended):
                await release_key(bus, names, app, session)
            if over := await resumed(bus, names, list(kept)):
                on_resumed(over)
        except BusError as error:
            log.debug("looking after what was left: %s", error)
        except msgspec.MsgspecError as error:
            log.error("looking after what was left: %s", error)
        await asyncio.sleep(LOOK_SECONDS)


class Absence:
    """One time without a node: its door is open, what was left is looked after, and who comes first has it.

    *on_event* is told of a visit and of a resumption, which stay in ``visit`` and ``resumed``.
    """

    def __init__(self, bus: Bus, names: Names, session: SessionId, on_event: Callable[[], None]) -> None:
        self._bus, self._names, self._session, self._on_event = bus, names, session, on_event
        self._door = Door(session, self._on_visit)
        self._background = Background(log)
        self._looking: asyncio.Task[None] | None = None
        self._is_over = False
        self.visit: Visit | None = None
        self.resumed: set[str] = set()

    async def begin(self, state_dir: Path, keep: wire.Keep) -> None:
        """Open the door, and look after what was left."""
        try:
            await self._door.open(state_dir)
        except OSError as error:
            log.error("node %s: its next life cannot reach this keeper: %s", self._session.node, error)
        self.look_anew(keep)

    def look_anew(self, keep: wire.Keep) -> None:
        """Look after what was left, as *keep* has it by now."""
        if self._looking is not None:
            self._looking.cancel()
        looking = look_after(
            self._bus, self._names, self._session, set(keep.apps), set(keep.others), self._on_resumed
        )
        self._looking = self._background.spawn(looking, "keeper alone")

    def end(self) -> None:
        """Somebody has it, or there is nothing left to have."""
        self._is_over = True
        self._door.close()
        if self._looking is not None:
            self._looking.cancel()

    def _on_visit(self, transport: asyncio.WriteTransport, pid: int, wish: wire.FromVisitor) -> None:
        if self.visit is not None or self._is_over:
            transport.abort()  # the first one has it
            return
        self.visit = (transport, pid, wish)
        self._on_event()

    def _on_resumed(self, apps: set[str]) -> None:
        self.resumed |= apps
        self._on_event()


def refusal(start: wire.Start, wish: wire.Attach) -> str:
    """Why the session can't go on for who has come; empty if it can."""
    if (wish.platform, wish.node) != (start.platform, start.session.node):
        return f"it is {wish.node} of platform {wish.platform}"
    if wish.timing != start.timing:
        return "its timings have changed"
    if wish.nats != start.nats:
        return "its NATS servers or login have changed"
    return ""
