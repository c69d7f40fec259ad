"""A session of a process that is no node, renewed by a task of its own: what a client's locks hang on.

It is a session like a node's, by the same rules and clocks, so nobody else is granted what it holds before it
is over for good. What it has not is a keeper: when the process dies its session ends with the TTL, not at
once; and nobody ends code in the process that goes on after its session. Hence: only the fencing token
protects from a client that was paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, SessionLost, StartError
from phalanx.keeper.renewing import Renewer
from phalanx.names import Names
from phalanx.ports import Bus
from phalanx.types import SessionId

log = logging.getLogger("phalanx.session")

START_SECONDS = 10.0
"""How long reading the platform's state may take."""

ESTABLISH_SECONDS = 4.0
"""How long a session may take to begin, besides its TTL."""

RELEASE_SECONDS = 2.0


def client_name() -> str:
    """Who holds what a client holds: ``client-<host>-<pid>``, as a DNS label."""
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")
    return f"client-{host[:40].strip('-') or 'host'}-{os.getpid()}"


class ClientSession:
    """Begin it with :meth:`start`. When it is lost it stays lost: make another one."""

    def __init__(self, bus: Bus, names: Names) -> None:
        self._bus, self._names = bus, names
        self.id = SessionId.new(client_name())
        self.lost_reason = ""
        self.register: Register
        self._timing: Timing
        self._renewer: Renewer | None = None
        self._state = PlatformState(bus, names)
        self._wake, self._established, self._lost = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._background = Background(log)
        self._closing = False

    @property
    def is_valid(self) -> bool:
        """Whether the session is this client's at this very moment."""
        renewer = self._renewer
        over = renewer is None or self._closing or self._lost.is_set()
        return not over and renewer is not None and renewer.holder.is_valid(system.now())

    @property
    def valid_until(self) -> float:
        """On the clock of ``system.now()``; moves with every renewal."""
        return self._renewer.holder.valid_until if self._renewer is not None else float("-inf")

    def on_change(self, callback: Callable[[], None]) -> None:
        """Be told when the session is lost."""
        self._callbacks.append(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        """No longer be told."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    async def start(self) -> None:
        """Have the session. Raises StartError where that can't be; then nothing is left of it."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._state.start()
                streams = self._state.streams
                ttls = [member.ttl_seconds for member in self._state.members.values() if member.ttl_seconds]
                if streams is None or not ttls:
                    raise StartError("the platform has no node that says how long sessions last", "start one")
                # Of a node that is gone the key may tell of an earlier TTL. So this session gives up by the
                # shortest of them, and ends those of others by the longest: never one that still holds.
                self._timing = Timing.of(min(ttls))
                judging = Timing.of(max(ttls))
                self.register = Register(self._bus, self._names, streams, judging, self.id)
                self._tasks.append(asyncio.create_task(self.register.run(), name="session register"))
                await self.register.ready.wait()
        except TimeoutError:
            raise StartError(
                f"the platform's state could not be read within {START_SECONDS:g} s", "check the NATS servers"
            ) from None
        self._renewer = Renewer(
            self._bus, self._names, self.id, self.register.streams, self._timing, self._wake.set
        )
        self._state.on_streams(self._use_streams)
        self._tasks.append(asyncio.create_task(self._renew(self._renewer), name="client session"))
        if not await wait_at_most(self._established, ESTABLISH_SECONDS + self._timing.ttl):
            raise StartError(
                f"no session for the locks of this client: {self.lost_reason or 'nobody takes its renewals'}",
                "log in as the nodes do: other logins may not write sessions",
            )
        await self._check_streams()

    async def _check_streams(self) -> None:
        """The list may have been replaced meanwhile, unseen by who replaced it."""
        found = await self._state.read(self._names.SESSIONS_KEY, StreamList)
        if found is not None and found[0].generation != self.register.streams.generation:
            raise StartError("the list of session streams is just being replaced", "try again")

    def _use_streams(self, streams: StreamList) -> None:
        async def use() -> None:
            # The observer first, as in a node: to be seen under a list means to judge by it.
            await self.register.use_streams(streams)
            if self._renewer is not None:
                self._renewer.holder.is_valid(system.now())
                self._renewer.holder.on_streams(streams)
                self._wake.set()

        self._background.spawn(use(), "use streams")

    async def _renew(self, renewer: Renewer) -> None:
        holder, next_tick = renewer.holder, 0.0
        while True:
            self._wake.clear()
            now = system.now()
            if now >= next_tick:
                renewer.tick()
                next_tick = now + self._timing.renew_every
            elif holder.reads():
                renewer.tick()
            if holder.is_valid(now):
                self._established.set()
            elif holder.is_ended or self._established.is_set():
                self._lose("ended by others" if holder.is_ended else "no majority of renewals in time")
                return
            ends = holder.valid_until if self._established.is_set() else next_tick
            await wait_at_most(self._wake, max(0.001, min(next_tick, ends) - system.now()))

    def _lose(self, reason: str) -> None:
        self.lost_reason = reason
        self._lost.set()
        log.error("session %s of this client is lost: %s", self.id, reason)
        self._tell()

    def _tell(self) -> None:
        for callback in list(self._callbacks):
            callback()

    async def close(self) -> None:
        """End the session: whoever holds something through it is told first. Harmless when done twice."""
        if self._closing:
            return
        was_valid, self._closing = self.is_valid, True
        self.lost_reason = self.lost_reason or "the client ends it"
        self._tell()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._renewer is not None:
            deadline = system.now() + (RELEASE_SECONDS if was_valid else 0.0)
            with contextlib.suppress(BusError):
                if (
                    not await self._renewer.release("the client ends it", self.id.node, deadline)
                    and was_valid
                ):
                    log.warning("session %s: nobody confirmed its end; it expires", self.id)
        await self._background.close()
        await self._state.close()


async def start_session(bus: Bus, names: Names) -> ClientSession:
    """A session that is valid. Raises StartError."""
    session = ClientSession(bus, names)
    await session.start()
    if not session.is_valid:
        raise SessionLost(str(session.id), session.lost_reason)
    return session


__all__ = ["ClientSession", "client_name", "start_session"]
