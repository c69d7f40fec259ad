"""Taking up the session of this node's earlier life: its keeper has held it since that ended in a pause."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import msgspec

from phalanx import system
from phalanx.coord.session import Session
from phalanx.keeper import note, wire

log = logging.getLogger("phalanx.session")

PATIENCE_SECONDS = 30.0
"""So long the next life waits for a keeper that lives: to be heard by it, or for its end."""

_LOOK_SECONDS = 0.05


async def take_up(state_dir: Path, wish: wire.Attach) -> Session | None:
    """The session that the keeper of an earlier life holds for us.

    None where there is none, or it is refused: then nothing of that life runs any more.
    The caller has the lock of *state_dir*, so that life is over.
    """
    found = note.read(state_dir)
    if found is None:
        return None
    keeper = system.ProcessRef(found.pid, found.start_time)
    deadline = system.now() + PATIENCE_SECONDS
    while found.lives and system.now() < deadline:
        channel = await _connect(state_dir, deadline)
        if channel is None:
            await asyncio.sleep(_LOOK_SECONDS)  # it has not noticed yet that its node is gone
            continue
        try:
            session = await _agree(channel, keeper, wish)
        except (OSError, EOFError, ValueError, TimeoutError, msgspec.MsgspecError) as error:
            log.warning("the keeper of an earlier life does not go on: %s", error or type(error).__name__)
            channel.close()
            await asyncio.sleep(_LOOK_SECONDS)
            continue
        if session is not None:
            return session
        channel.close()
        await _see_end(found, deadline)
    if found.lives:
        log.error("the keeper of an earlier life (process %d) neither goes on nor ends", found.pid)
    return None


async def _connect(state_dir: Path, deadline: float) -> socket.socket | None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.setblocking(False)
    try:
        with note.socket_path(state_dir) as path:
            async with asyncio.timeout(max(0.1, deadline - system.now())):
                await asyncio.get_running_loop().sock_connect(channel, path)
    except (OSError, TimeoutError):
        channel.close()
        return None
    return channel


async def _agree(channel: socket.socket, keeper: system.ProcessRef, wish: wire.Attach) -> Session | None:
    """The session, if both want it. None: the keeper ends everything now."""
    said = _Said(channel)
    async with asyncio.timeout(PATIENCE_SECONDS):
        hello = wire.decode_hello(await said.line())
        log.info("process %d is the keeper of an earlier life, session %s", keeper.pid, hello.session)
        loop = asyncio.get_running_loop()
        if hello.version != wire.VERSION:
            reason = f"its next life speaks version {wire.VERSION} to keepers, not {hello.version}"
            log.warning("%s: what was left running ends, and begins anew", reason)
            await loop.sock_sendall(channel, wire.encode(wire.End(reason)))
            return None
        await loop.sock_sendall(channel, wire.encode(wish))
        answer = wire.decode_from_keeper(await said.line())
    if not isinstance(answer, wire.Attached):
        reason = answer.reason if isinstance(answer, wire.Lost) else "it is not understood"
        log.warning("what was left running ends, and begins anew: %s", reason)
        return None
    session = Session(answer.session, wish.timing)
    await session.go_on(channel, keeper, answer.resources, said.rest)
    return session


async def _see_end(found: note.KeeperNote, deadline: float) -> None:
    while found.lives and system.now() < deadline:  # noqa: ASYNC110 - it is no child, and may be no parent's
        await asyncio.sleep(_LOOK_SECONDS)


class _Said:
    """What comes over a socket, line by line."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self.rest = channel, b""

    async def line(self) -> bytes:
        while b"\n" not in self.rest:
            data = await asyncio.get_running_loop().sock_recv(self._channel, 65536)
            if not data:
                raise EOFError("it has closed its end")
            self.rest += data
            if len(self.rest) > wire.MAX_LINE_BYTES:
                raise ValueError("it says too much")
        line, _, self.rest = self.rest.partition(b"\n")
        return line


__all__ = ["take_up"]
