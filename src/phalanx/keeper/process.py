"""The keeper process: it begins to hold its node's session (:mod:`.holding`), and hears what the node says.

Its life: Start from the node → the wardens' lock → kill left-overs → session established → renew until the
node says Release, or dies, or stalls, or outlives its session → fence → end the session → exit.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from phalanx import system
from phalanx.config import NatsOptions
from phalanx.decide.keeper import Watchdog
from phalanx.errors import PhalanxError
from phalanx.keeper import fencing, wire
from phalanx.keeper.ending import Ending
from phalanx.keeper.holding import Holding
from phalanx.keeper.link import NodeLink
from phalanx.keeper.renewing import Renewer
from phalanx.keeper.warden import Warden
from phalanx.keeper.wardens import Wardens
from phalanx.keeper.wishes import Wishes
from phalanx.names import Names
from phalanx.ports import Bus
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")


class OwnBus(Bus, Protocol):
    """A bus whose connection nobody else uses."""

    async def close(self) -> None:
        """End the connection."""
        ...


Connect = Callable[[NatsOptions, str, float], Awaitable[OwnBus]]
"""Builds the bus: options, client name, ping interval in seconds."""


class Keeper:
    """One keeper, for one session of one node."""

    def __init__(
        self,
        channel: socket.socket,
        node_pid: int,
        connect: Connect,
        warden: Warden,
        on_start: Callable[[wire.Start], None] = lambda start: None,
    ) -> None:
        self._on_start = on_start
        self._socket, self._connect = channel, connect
        self._link = NodeLink(node_pid, self.on_message, self._on_gone)
        self._wardens = Wardens(warden, self._link)
        self._wishes = Wishes()
        self._wake = asyncio.Event()
        self._started: asyncio.Future[wire.Start] = asyncio.get_running_loop().create_future()
        self._registry: fencing.Registry | None = None
        self._renewer: Renewer | None = None
        self._watchdog: Watchdog | None = None

    async def run(self) -> None:
        """Serve until the session has ended."""
        await self._link.open(self._socket)
        try:
            start = await asyncio.wait_for(self._started, 30)
            self._on_start(start)
            await self._serve(start)
            self._wardens.dismiss()
            self._wishes.forget(Path(start.state_dir))
        finally:
            self._wardens.close()
            self._link.let_go()

    async def _serve(self, start: wire.Start) -> None:
        registry = await self._clear_left_overs(Path(start.state_dir))
        if registry is None:
            return
        try:
            # Pings notice a server that died without a word within three intervals.
            bus = await self._connect(
                start.nats, f"phalanx-keeper {start.session}", max(0.1, start.timing.ttl / 20)
            )
        except PhalanxError as error:
            self._link.say(wire.Lost(str(error)))
            return
        self._watchdog = watchdog = Watchdog(start.timing, system.now())
        self._renewer = renewer = Renewer(
            bus, Names(start.platform), start.session, start.streams, start.timing, self._wake.set
        )
        if self._wishes.streams is not None:
            renewer.holder.on_streams(self._wishes.streams.streams)
        ending = Ending(start, renewer, registry, self._link, self._wardens)
        try:
            await Holding(
                start,
                renewer,
                watchdog,
                registry,
                self._link,
                self._wishes,
                ending,
                self._wardens,
                self._wake,
            ).run()
        finally:
            await bus.close()

    async def _clear_left_overs(self, state_dir: Path) -> fencing.Registry | None:
        """The registry, once nothing of an earlier life runs and a warden looks after what is to come.

        None where that cannot be had: the node was told why.
        """
        try:
            await self._wardens.take_lock(state_dir)
        except TimeoutError as error:
            self._link.say(wire.Lost(f"what an earlier life of this node has left is not gone: {error}"))
            return None
        self._registry = registry = fencing.Registry(state_dir)
        try:
            left = registry.left_over()
        except fencing.LeftOversUnknown as error:
            log.critical("%s", error)
            self._link.say(wire.Lost(str(error)))
            return None
        while not await fencing.kill_resources(left):
            self._link.say(wire.Lost("left-overs of an earlier life do not die"))
            await asyncio.sleep(1)
        self._wardens.instruct(state_dir)
        return registry

    # --- what the node says

    def on_message(self, message: wire.FromNode) -> None:
        """One message of the node."""
        if self._watchdog is not None:
            self._watchdog.on_beat(system.now())
        match message:
            case wire.Start():
                self._started.set_result(message)
            case wire.Beat():
                pass
            case wire.Register(number, resource):
                if self._registry is not None:
                    self._register(self._registry, number, resource)
            case wire.Unregister(resource_id):
                if self._registry is not None:
                    self._registry.remove(resource_id)
            case wire.Streams():
                self._wishes.streams = message
                if self._renewer is not None:
                    # First the verdict under the old list: what ran out must not be revived by a new one.
                    self._renewer.holder.is_valid(system.now())
                    self._renewer.holder.on_streams(message.streams)
                    self._wake.set()
            case wire.Release():
                self._wishes.release = message
                self._wake.set()
            case wire.Extend(app, moment):
                self._wishes.extend(app, moment)
                self._wake.set()
            case wire.Keep():
                self._note_keep(message)
            case wire.Leave(keep):
                self._note_keep(keep)
                self._wishes.leave = message
                self._wake.set()

    def _note_keep(self, keep: wire.Keep) -> None:
        if not self._started.done():
            self._wishes.keep = keep
            return
        start = self._started.result()
        self._wishes.note_keep(keep, Path(start.state_dir), start.session)

    def _register(self, registry: fencing.Registry, number: int, resource: Resource) -> None:
        try:
            registry.add(resource)
        except OSError as error:
            # A full disk is no reason to kill the node: what can't be noted just does not start here.
            log.error("app %s: cannot note what it starts: %s", resource.app, error)
            self._link.say(wire.Refused(number, str(error)))
        else:
            self._link.say(wire.Registered(number))

    def _on_gone(self) -> None:
        self._wake.set()
        if not self._started.done():
            self._started.set_exception(EOFError(self._link.gone))


__all__ = ["Connect", "Keeper", "OwnBus"]
