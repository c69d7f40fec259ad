"""The keeper process: one loop that renews, watches its node, and fences when it must.

Its life: Start from the node → the wardens' lock → kill left-overs → session established → renew until the
node says Release, or dies, or stalls, or outlives its session → fence → end the session → exit.

In a pause a node that ends or dies leaves the keeper alone with what can run on (:mod:`.away`): it goes on
renewing until the node's next life comes, or the pause is over, or nobody has come for too long.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.config import NatsOptions
from phalanx.decide.keeper import Fencing, Watchdog
from phalanx.decide.pause import kept
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, PhalanxError
from phalanx.keeper import away, fencing, note, wire
from phalanx.keeper.renewing import Renewer
from phalanx.keeper.warden import RESPAWN_SECONDS, Warden, take_lock
from phalanx.names import Names
from phalanx.ports import Bus
from phalanx.types import Resource

Visit = tuple[asyncio.WriteTransport, int, wire.FromVisitor]

log = logging.getLogger("phalanx.keeper")


class OwnBus(Bus, Protocol):
    """A bus whose connection nobody else uses."""

    async def close(self) -> None:
        """End the connection."""
        ...


OWN_PAUSE_SECONDS = 0.2
"""Waking so much later than asked for means that this process was paused itself."""

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
        self._node = fencing.NodeProcess(node_pid)
        self._warden: Warden | None = warden
        self._warden_lock: system.FileLock | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._started: asyncio.Future[wire.Start] = asyncio.get_running_loop().create_future()
        self._release: wire.Release | None = None
        self._gone: str | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._registry: fencing.Registry | None = None
        self._renewer: Renewer | None = None
        self._watchdog: Watchdog | None = None
        self._pending_streams: wire.Streams | None = None
        self._switched_at = float("-inf")
        self._told, self._is_told = float("-inf"), False
        self._keep = wire.Keep(())
        self._leave: wire.Leave | None = None
        self._noted = False
        self._visit: Visit | None = None
        self._resumed: set[str] = set()
        self._door: away.Door | None = None
        self._looking: asyncio.Task[None] | None = None
        self._end_exit_watch: Callable[[], None] | None = None
        self._channel: _Channel | None = None

    async def run(self) -> None:
        """Serve until the session has ended."""
        loop = asyncio.get_running_loop()
        self._channel = _Channel(self)
        channel = self._channel
        transport, _ = await loop.connect_accepted_socket(lambda: channel, self._socket)
        self._transport = transport
        self._watch_exit()
        try:
            start = await asyncio.wait_for(self._started, 30)
            self._on_start(start)
            await self._serve(start)
            self._dismiss_warden()
            if self._noted:
                note.remove(Path(start.state_dir))
        finally:
            if self._replacing is not None:
                self._replacing.cancel()
            self._let_go_of_node()
            self._close_door()

    def _watch_exit(self) -> None:
        self._end_exit_watch = system.watch_exit(
            self._node.pid, lambda: self._on_gone("the node's process ended")
        )

    def _let_go_of_node(self) -> None:
        """What it says or does from now on means nothing."""
        if self._end_exit_watch is not None:
            self._end_exit_watch()
        transport, self._transport, self._end_exit_watch, self._channel = self._transport, None, None, None
        if transport is not None:
            transport.close()

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
        if self._looking is not None:
            self._looking.cancel()
        self._door = self._looking = None

    async def _serve(self, start: wire.Start) -> None:
        state_dir = Path(start.state_dir)
        try:
            self._warden_lock = await take_lock(state_dir)
        except TimeoutError as error:
            self._say(wire.Lost(f"what an earlier life of this node has left is not gone: {error}"))
            return
        self._registry = fencing.Registry(state_dir)
        try:
            left = self._registry.left_over()
        except fencing.LeftOversUnknown as error:
            log.critical("%s", error)
            self._say(wire.Lost(str(error)))
            return
        while not await fencing.kill_resources(left):
            self._say(wire.Lost("left-overs of an earlier life do not die"))
            await asyncio.sleep(1)
        self._instruct_warden(state_dir)
        try:
            # Pings notice a server that died without a word within three intervals.
            bus = await self._connect(
                start.nats, f"phalanx-keeper {start.session}", max(0.1, start.timing.ttl / 20)
            )
        except PhalanxError as error:
            self._say(wire.Lost(str(error)))
            return
        self._watchdog = Watchdog(start.timing, system.now())
        self._renewer = Renewer(
            bus, Names(start.platform), start.session, start.streams, start.timing, self._wake.set
        )
        if self._pending_streams is not None:
            self._renewer.holder.on_streams(self._pending_streams.streams)
        try:
            await self._hold(start, self._renewer, self._watchdog, self._registry)
        finally:
            await bus.close()

    async def _hold(
        self, start: wire.Start, renewer: Renewer, watchdog: Watchdog, registry: fencing.Registry
    ) -> None:
        holder, established = renewer.holder, False
        next_tick, self._switched_at = 0.0, system.now()
        while True:
            now = system.now()
            if now >= next_tick:
                renewer.tick()
                next_tick = now + start.timing.renew_every
            elif holder.reads():
                renewer.tick()
            valid = holder.is_valid(now)
            established = established or valid
            self._tell(renewer, valid)
            if self._release is not None:
                await self._end(start, renewer, registry, self._release.reason, kill_node=False)
                return
            if self._gone is not None:
                watchdog.on_gone(self._gone)
            if established and not valid:
                reason = "ended by others" if holder.is_ended else "no majority of renewals in time"
                self._say(wire.Lost(reason))
                await self._end(start, renewer, registry, reason, kill_node=registry.has_sections)
                return
            valid_until = holder.valid_until if established else now + start.timing.ttl
            keeps = established and bool(self._keep.apps)
            if self._leave is not None and not watchdog.is_away:
                await self._be_alone(start, renewer, registry, watchdog, Fencing("the node leaves", False))
                continue
            verdict = watchdog.verdict(now, valid_until, has_resources=len(registry) > 0, keeps=keeps)
            if verdict is not None and verdict.keep:
                await self._be_alone(start, renewer, registry, watchdog, verdict)
                continue
            if verdict is not None:
                await self._fence(start, renewer, registry, verdict)
                return
            if watchdog.is_away and (reason := await self._while_away(start, renewer, registry, watchdog)):
                await self._end(start, renewer, registry, reason, kill_node=False)
                return
            await self._leave_isolated_server(renewer, start.timing, now)
            ends = holder.valid_until if valid else next_tick
            await self._sleep_until(min(next_tick, watchdog.next_check(valid_until), ends))

    def _tell(self, renewer: Renewer, valid: bool) -> None:
        """Tell the node what is new of the session."""
        if not valid or self._transport is None:
            return
        if not self._is_told:
            self._is_told = True
            self._say(wire.Established())
        if renewer.holder.valid_until > self._told:
            self._told = renewer.holder.valid_until
            self._say(wire.ValidUntil(self._told, renewer.renewals))

    # --- alone in a pause

    async def _be_alone(
        self,
        start: wire.Start,
        renewer: Renewer,
        registry: fencing.Registry,
        watchdog: Watchdog,
        why: Fencing,
    ) -> None:
        """The node has ended, or is to: end what cannot outlive it, and go on with the rest."""
        log.warning("node %s: %s, in a pause; what can runs on", start.session.node, why.reason)
        await self._end_unkept(start, renewer, registry, kill_node=why.kill_node)
        # Again: a node that woke up only now may have begun something between that look and its death.
        await self._end_unkept(start, renewer, registry, kill_node=False)
        watchdog.on_away(system.now())
        self._gone = None
        self._door = away.Door(start.session, self._on_visit)
        try:
            await self._door.open(Path(start.state_dir))
        except OSError as error:
            log.error("node %s: its next life cannot reach this keeper: %s", start.session.node, error)
        self._look_anew(start, renewer)
        if self._leave is not None:
            self._say(wire.Left())
            self._leave = None
            # Its end of the channel closes with it; until then it is none of our business.
            self._channel, self._transport = None, None
        self._let_go_of_node()

    async def _end_unkept(
        self, start: wire.Start, renewer: Renewer, registry: fencing.Registry, *, kill_node: bool
    ) -> None:
        left = kept(registry.resources, self._keep.apps)
        ending = [resource for resource in registry.resources if resource not in left]
        await self._end_resources(start, renewer, registry, ending, kill_node=kill_node)

    async def _while_away(
        self, start: wire.Start, renewer: Renewer, registry: fencing.Registry, watchdog: Watchdog
    ) -> str:
        """See to who has come, and to what was resumed. Not empty: why everything has to end now."""
        if over := self._resumed & set(self._keep.apps):
            log.warning("node %s: resumed while it is away: %s end", start.session.node, ", ".join(over))
            ending = [resource for resource in registry.resources if resource.app in over]
            await self._end_resources(start, renewer, registry, ending, kill_node=False)
            apps = tuple(app for app in self._keep.apps if app not in over)
            self._keep = wire.Keep(apps, (*self._keep.others, *over))
            if not apps:
                return "resumed while the node is away"
            for app in over:
                try:
                    await away.release_key(renewer.bus, Names(start.platform), app, start.session)
                except BusError as error:
                    log.warning("app %s: its leader key is given back later: %s", app, error)
            self._look_anew(start, renewer)
        if self._visit is None:
            return ""
        transport, pid, wish = self._visit
        self._visit = None
        if isinstance(wish, wire.End):
            return wish.reason
        if reason := _refusal(start, wish):
            wire.send(transport, wire.Lost(reason))
            return reason
        await self._be_taken_up(start, renewer, registry, watchdog, transport, pid, wish)
        return ""

    def _look_anew(self, start: wire.Start, renewer: Renewer) -> None:
        """Look after what was left, as ``_keep`` has it by now."""
        if self._looking is not None:
            self._looking.cancel()
        looking = away.look_after(
            renewer.bus,
            Names(start.platform),
            start.session,
            set(self._keep.apps),
            set(self._keep.others),
            self._on_resumed,
        )
        self._looking = asyncio.create_task(looking, name="keeper alone")

    async def _be_taken_up(
        self,
        start: wire.Start,
        renewer: Renewer,
        registry: fencing.Registry,
        watchdog: Watchdog,
        transport: asyncio.WriteTransport,
        pid: int,
        wish: wire.Attach,
    ) -> None:
        """From now on there is a node again. What it cannot adopt ends first."""
        ending = [resource for resource in registry.resources if resource.app not in wish.apps]
        await self._end_resources(start, renewer, registry, ending, kill_node=False)
        self._close_door()
        self._node = fencing.NodeProcess(pid, system.ProcessRef.of(pid))
        self._channel = _Channel(self)
        self._transport, self._told, self._is_told, self._resumed = transport, float("-inf"), False, set()
        transport.set_protocol(self._channel)
        watchdog.on_back(system.now())
        self._watch_exit()
        log.info("node %s: taken up by process %d", start.session.node, pid)
        self._say(wire.Attached(start.session, tuple(registry.resources)))
        self._tell(renewer, renewer.holder.is_valid(system.now()))

    def _on_visit(self, transport: asyncio.WriteTransport, pid: int, wish: wire.FromVisitor) -> None:
        if self._visit is not None:
            transport.abort()  # the first one has it
            return
        self._visit = (transport, pid, wish)
        self._wake.set()

    def _on_resumed(self, apps: set[str]) -> None:
        self._resumed |= apps
        self._wake.set()

    async def _end_resources(
        self,
        start: wire.Start,
        renewer: Renewer,
        registry: fencing.Registry,
        resources: list[Resource],
        *,
        kill_node: bool,
    ) -> None:
        """Return when *resources* (and the node) are gone.

        What does not die yet must not run without a session, if it can be held.
        """
        killing = asyncio.create_task(self._kill(start, resources, kill_node), name="keeper kill")
        while not killing.done():
            await asyncio.wait({killing}, timeout=start.timing.renew_every)
            if not killing.done():
                renewer.tick()
        killing.result()
        for resource in resources:
            registry.remove(resource.id)

    async def _leave_isolated_server(self, renewer: Renewer, timing: Timing, now: float) -> None:
        """A server that answers pings but has lost its routes reaches no majority of session streams."""
        newest = renewer.holder.valid_until - timing.hold
        patience = max(3 * timing.renew_every, 0.25 * timing.ttl)
        # One that was reached a moment ago had no time to answer: leaving it too would never end.
        begun = max(newest, self._switched_at, renewer.connected_at)
        if now - begun > patience and renewer.is_connected:
            self._switched_at = now
            await renewer.switch_server(f"no majority of renewals for {patience:g} s")

    async def _sleep_until(self, moment: float) -> None:
        self._wake.clear()
        await wait_at_most(self._wake, max(0.001, moment - system.now()))
        if system.now() - moment > OWN_PAUSE_SECONDS and self._watchdog is not None:
            # It was this process that stood still, perhaps the whole machine: the node's beats of that
            # time are still in the socket, or come only now. Judge from here on.
            self._watchdog.on_beat(system.now())

    async def _fence(
        self, start: wire.Start, renewer: Renewer, registry: fencing.Registry, verdict: Fencing
    ) -> None:
        log.error("node %s: fencing it: %s", start.session.node, verdict.reason)
        # Before anything is killed: what the node registers from now on would not be killed any more.
        self._say(wire.Lost(verdict.reason))
        # At the end of a session only code inside the node forces us to kill the node itself.
        kill_node = verdict.kill_node or registry.has_sections
        await self._end(start, renewer, registry, verdict.reason, kill_node=kill_node)

    async def _end(
        self,
        start: wire.Start,
        renewer: Renewer,
        registry: fencing.Registry,
        reason: str,
        *,
        kill_node: bool,
    ) -> None:
        """Kill what must be gone, then end the session. The order is the invariant: never release first."""
        await self._end_resources(start, renewer, registry, registry.resources, kill_node=kill_node)
        self._dismiss_warden()
        complete = await renewer.release(
            reason, by=f"keeper of {start.session.node}", deadline=system.now() + 2 * start.timing.ttl
        )
        if kill_node:
            await renewer.report_fenced(reason)
        if not complete:
            log.error("session %s: could not be released (%s); it expires instead", start.session, reason)
        self._say(wire.Released(complete))

    async def _kill(self, start: wire.Start, resources: list[Resource], kill_node: bool) -> None:
        """Return only when the node (if it is to be killed) and all registered processes are gone."""
        known = fencing.Known()
        if kill_node:
            if self._node.lives():
                known = await fencing.find_processes(resources)
            self._node.kill()
        while not await fencing.kill_resources(resources, known):
            log.error("node %s: not releasing while processes of it still run", start.session.node)
        if kill_node:
            await self._node.gone()
            # Again: the last call of the dying node may have put one back.
            addresses = [resource for resource in resources if resource.kind == "vip"]
            while not await fencing.kill_resources(addresses):
                log.error("node %s: not releasing while its addresses are here", start.session.node)

    # --- the warden

    def _instruct_warden(self, state_dir: Path) -> None:
        """Have it kill what is registered, should this process die; and be told if it dies itself."""
        warden = self._warden
        if warden is None:
            return
        warden.watch(lambda: self._on_warden_death(state_dir))
        try:
            warden.tell(state_dir, self._warden_lock)
        except OSError as error:
            log.debug("the warden is dead: %s", error)  # the watch tells of it

    def _on_warden_death(self, state_dir: Path) -> None:
        if self._warden is not None:
            problem = f"the warden (process {self._warden.pid}) has ended: {self._warden.reap()}"
            log.error("%s; another one is started", problem)
            self._say(wire.Noted("warden-exited", problem))
            self._warden = None
            self._replacing = asyncio.create_task(self._replace_warden(state_dir), name="keeper warden")

    async def _replace_warden(self, state_dir: Path) -> None:
        while self._warden is None:
            await asyncio.sleep(RESPAWN_SECONDS)
            try:
                self._warden = await asyncio.to_thread(Warden.spawn)
            except OSError as error:
                log.error("no warden can be started: %s", error)
        self._instruct_warden(state_dir)

    def _dismiss_warden(self) -> None:
        """Nothing is left that it would have to kill, and nothing is registered any more."""
        if self._replacing is not None:
            self._replacing.cancel()
        if self._warden is not None:
            self._warden.goodbye()
        if self._warden_lock is not None:
            self._warden_lock.release()

    # --- what the node says

    def on_line(self, channel: _Channel, line: bytes) -> None:
        """One line of the node; of one that has left it means nothing any more."""
        if channel is self._channel:
            self.on_message(wire.decode_from_node(line))

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
                self._pending_streams = message
                if self._renewer is not None:
                    # First the verdict under the old list: what ran out must not be revived by a new one.
                    self._renewer.holder.is_valid(system.now())
                    self._renewer.holder.on_streams(message.streams)
                    self._wake.set()
            case wire.Release():
                self._release = message
                self._wake.set()
            case wire.Keep():
                self._note_keep(message)
            case wire.Leave(keep):
                self._note_keep(keep)
                self._leave = message
                self._wake.set()

    def _note_keep(self, keep: wire.Keep) -> None:
        self._keep = keep
        if not self._started.done() or bool(keep.apps) is self._noted:
            return
        start = self._started.result()
        self._noted = not self._noted
        if self._noted:
            note.write(Path(start.state_dir), start.session)
        else:
            note.remove(Path(start.state_dir))

    def _register(self, registry: fencing.Registry, number: int, resource: Resource) -> None:
        try:
            registry.add(resource)
        except OSError as error:
            # A full disk is no reason to kill the node: what can't be noted just does not start here.
            log.error("app %s: cannot note what it starts: %s", resource.app, error)
            self._say(wire.Refused(number, str(error)))
        else:
            self._say(wire.Registered(number))

    def _on_gone(self, reason: str) -> None:
        if self._gone is None:
            self._gone = reason
            self._wake.set()
            if not self._started.done():
                self._started.set_exception(EOFError(reason))

    def on_closed(self, channel: _Channel) -> None:
        """The node closed its end."""
        if channel is self._channel:
            self._on_gone("the node closed its channel")

    def _say(self, message: wire.FromKeeper) -> None:
        if self._transport is not None and not wire.send(self._transport, message):
            self._on_gone("the node does not read")


class _Channel(asyncio.Protocol):
    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._lines = keeper, wire.Lines()

    def data_received(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            self._keeper.on_line(self, line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keeper.on_closed(self)


def _refusal(start: wire.Start, wish: wire.Attach) -> str:
    """Why the session can't go on for who has come; empty if it can."""
    if (wish.platform, wish.node) != (start.platform, start.session.node):
        return f"it is {wish.node} of platform {wish.platform}"
    if wish.timing != start.timing:
        return "its timings have changed"
    if wish.nats != start.nats:
        return "its NATS servers or login have changed"
    return ""
