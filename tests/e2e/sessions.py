"""Nodes in the test's own process: sessions that it renews by itself, and real registers of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import msgspec

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import create_stream, session_config
from phalanx.config import NatsOptions
from phalanx.coord.register import Register
from phalanx.decide.session import SessionBody, StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.types import SessionId

NAMES = Names("prod")
STREAM = NAMES.session_stream(1)
STREAMS = StreamList(1, (STREAM,))
LONG_TIMING = Timing.of(10.0)


class Heartbeat:
    """A session that this process renews by itself, in place of a keeper."""

    def __init__(self, bus: NatsBus, node: str, timing: Timing) -> None:
        self.id, self.timing = SessionId.new(node), timing
        self.renewed_at = float("-inf")
        """When the latest renewal that is stored was sent."""
        self._bus, self._callbacks = bus, list[Callable[[], None]]()
        self._subject = NAMES.session_subject(STREAM, self.id)
        self._task: asyncio.Task[None] | None = None

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.remove(callback)

    async def start(self) -> None:
        await self._renew()
        self._task = asyncio.create_task(self._beat())

    async def _renew(self) -> None:
        sent_at = system.now()
        await self._bus.write(self._subject, msgspec.json.encode(SessionBody(1)))
        self.renewed_at = sent_at

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.timing.renew_every)
            with contextlib.suppress(BusError):
                await self._renew()

    async def die(self) -> None:
        """No longer renew, as in a power loss; whoever holds something by it is not told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None


class TimedHeartbeat(Heartbeat):
    """A session that holds for so long after its renewal, until its node has ended."""

    is_taken_up = False

    def __init__(self, bus: NatsBus, node: str) -> None:
        super().__init__(bus, node, LONG_TIMING)
        self.ended = False

    @property
    def valid_until(self) -> float:
        return self.renewed_at + self.timing.hold

    @property
    def is_valid(self) -> bool:
        return not self.ended and system.now() < self.valid_until

    @property
    def may_begin(self) -> bool:
        return self.is_valid and system.now() < self.timing.stand_down_at(self.valid_until)

    async def die(self) -> None:
        """See ``Heartbeat.die``."""
        self.ended = True
        await super().die()

    async def end(self) -> None:
        """No longer renew, and say so, as the keeper of a dead node does."""
        await self.die()
        body = SessionBody(1, True, "its node died", self.id.node, True)
        await self._bus.write(self._subject, msgspec.json.encode(body))


@asynccontextmanager
async def connected(node: str, urls: tuple[str, ...]) -> AsyncGenerator[NatsBus]:
    """The connection of *node*. The stream of sessions is made where it is missing."""
    bus = await NatsBus.connect(NatsOptions(urls=urls), name=node, ping_interval=1.0)
    try:
        await create_stream(bus, session_config(NAMES, STREAM))
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def registered(bus: NatsBus, session: Heartbeat) -> AsyncGenerator[Register]:
    """Start *session*: what its node knows of all sessions."""
    register = Register(bus, NAMES, STREAMS, session.timing, session.id)
    running = asyncio.create_task(register.run())
    try:
        await session.start()
        await register.ready.wait()
        yield register
    finally:
        await session.die()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
