"""The loop that holds one session: renew, judge the node, and fence when that must be.

In a pause a node that ends or dies leaves the keeper alone with what can run on (:mod:`.away`): it goes on
renewing until the node's next life comes, or the pause is over, or nobody has come for too long.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.decide.keeper import Fencing, Watchdog
from phalanx.decide.pause import kept
from phalanx.errors import BusError
from phalanx.keeper import away, fencing, wire
from phalanx.keeper.ending import Ending
from phalanx.keeper.link import NodeLink
from phalanx.keeper.renewing import Renewer
from phalanx.keeper.wardens import Wardens
from phalanx.keeper.wishes import Wishes
from phalanx.names import Names

log = logging.getLogger("phalanx.keeper")

OWN_PAUSE_SECONDS = 0.2
"""Waking so much later than asked for means that this process was paused itself."""


class Holding:
    """One session from its first renewal to its end. *wake* is set when something has happened."""

    def __init__(
        self,
        start: wire.Start,
        renewer: Renewer,
        watchdog: Watchdog,
        registry: fencing.Registry,
        link: NodeLink,
        wishes: Wishes,
        ending: Ending,
        wardens: Wardens,
        wake: asyncio.Event,
    ) -> None:
        self._start, self._names = start, Names(start.platform)
        self._renewer, self._watchdog, self._registry = renewer, watchdog, registry
        self._link, self._wishes, self._ending, self._wake = link, wishes, ending, wake
        self._wardens = wardens
        self._switched_at = float("-inf")
        self._absence: away.Absence | None = None

    async def run(self) -> None:
        """Return when the session has ended."""
        try:
            await self._hold()
        finally:
            self._end_absence()
            await self._ending.stop_prolonging()

    async def _hold(self) -> None:
        start, renewer, watchdog, wishes = self._start, self._renewer, self._watchdog, self._wishes
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
            if valid:
                self._link.tell_validity(renewer)
            if wishes.release is not None:
                await self._ending.end(wishes.release.reason, kill_node=False)
                return
            if self._link.gone is not None:
                watchdog.on_gone(self._link.gone)
            extended_until = wishes.extended_until(self._registry.resources)
            if established and not valid and now >= extended_until:
                reason = "ended by others" if holder.is_ended else "no majority of renewals in time"
                self._link.say(wire.Lost(reason))
                await self._ending.end(reason, kill_node=self._registry.has_sections)
                return
            valid_until = max(holder.valid_until, extended_until) if established else now + start.timing.ttl
            keeps = established and valid and bool(wishes.keep.apps)
            if wishes.leave is not None and valid and not watchdog.is_away:
                await self._be_alone(Fencing("the node leaves", False))
                continue
            has_resources = len(self._registry) > 0
            verdict = watchdog.verdict(now, valid_until, has_resources=has_resources, keeps=keeps)
            if verdict is not None and verdict.keep:
                await self._be_alone(verdict)
                continue
            if verdict is not None:
                await self._fence(verdict)
                return
            if self._absence is not None and (reason := await self._see_to(self._absence)):
                await self._ending.end(reason, kill_node=False)
                return
            if valid or not established:
                await self._leave_isolated_server(now)
            ends = holder.valid_until if valid else next_tick
            await self._sleep_until(min(next_tick, watchdog.next_check(valid_until), ends))

    async def _leave_isolated_server(self, now: float) -> None:
        """A server that answers pings but has lost its routes reaches no majority of session streams."""
        renewer, timing = self._renewer, self._start.timing
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
        if system.now() - moment > OWN_PAUSE_SECONDS:
            # It was this process that stood still, perhaps the whole machine: the node's beats of that
            # time are still in the socket, or come only now. Judge from here on.
            self._watchdog.on_beat(system.now())

    async def _fence(self, verdict: Fencing) -> None:
        log.error("node %s: fencing it: %s", self._start.session.node, verdict.reason)
        # Before anything is killed: what the node registers from now on would not be killed any more.
        self._link.say(wire.Lost(verdict.reason))
        # At the end of a session only code inside the node forces us to kill the node itself.
        kill_node = verdict.kill_node or self._registry.has_sections
        await self._ending.end(verdict.reason, kill_node=kill_node)

    # --- alone in a pause

    async def _be_alone(self, why: Fencing) -> None:
        """The node has ended, or is to: end what cannot outlive it, and go on with the rest."""
        session = self._start.session
        log.warning("node %s: %s, in a pause; what can runs on", session.node, why.reason)
        await self._end_unkept(kill_node=why.kill_node)
        # Again: a node that woke up only now may have begun something between that look and its death.
        await self._end_unkept(kill_node=False)
        self._watchdog.on_away(system.now())
        self._wardens.on_node(None)
        self._absence = away.Absence(self._renewer.bus, self._names, session, self._wake.set)
        await self._absence.begin(Path(self._start.state_dir), self._wishes.keep)
        self._ending.prolong_addresses()
        leaves = self._wishes.leave is not None
        if leaves:
            self._link.say(wire.Left())
            self._wishes.leave = None
        self._link.let_go(closes=not leaves)

    async def _end_unkept(self, *, kill_node: bool) -> None:
        left = kept(self._registry.resources, self._wishes.keep.apps)
        ending = [resource for resource in self._registry.resources if resource not in left]
        await self._ending.end_resources(ending, kill_node=kill_node)

    async def _see_to(self, absence: away.Absence) -> str:
        """See to who has come, and to what was resumed. Not empty: why everything has to end now."""
        if over := absence.resumed & set(self._wishes.keep.apps):
            await self._end_resumed(absence, over)
            if not self._wishes.keep.apps:
                return "resumed while the node is away"
        if absence.visit is None:
            return ""
        transport, pid, wish = absence.visit
        absence.visit = None
        if isinstance(wish, wire.End):
            return wish.reason
        if reason := away.refusal(self._start, wish):
            wire.send(transport, wire.Lost(reason))
            return reason
        await self._be_taken_up(transport, pid, wish)
        return ""

    async def _end_resumed(self, absence: away.Absence, over: set[str]) -> None:
        start, keep = self._start, self._wishes.keep
        log.warning("node %s: resumed while it is away: %s end", start.session.node, ", ".join(over))
        ending = [resource for resource in self._registry.resources if resource.app in over]
        await self._ending.end_resources(ending, kill_node=False)
        apps = tuple(app for app in keep.apps if app not in over)
        self._wishes.keep = wire.Keep(apps, (*keep.others, *over))
        if not apps:
            return
        for app in over:
            try:
                await away.release_key(self._renewer.bus, self._names, app, start.session)
            except BusError as error:
                log.warning("app %s: its leader key is given back later: %s", app, error)
        self._ending.prolong_addresses()
        absence.look_anew(self._wishes.keep)

    async def _be_taken_up(self, transport: asyncio.WriteTransport, pid: int, wish: wire.Attach) -> None:
        """From now on there is a node again. What it cannot adopt ends first."""
        session, renewer, registry = self._start.session, self._renewer, self._registry
        ending = [resource for resource in registry.resources if resource.app not in wish.apps]
        await self._ending.end_resources(ending, kill_node=False)
        self._end_absence()
        self._link.take_up(transport, pid)
        self._wardens.on_node(pid)
        self._watchdog.on_back(system.now())
        log.info("node %s: taken up by process %d", session.node, pid)
        self._link.say(wire.Attached(session, tuple(registry.resources)))
        if renewer.holder.is_valid(system.now()):
            self._link.tell_validity(renewer)

    def _end_absence(self) -> None:
        if self._absence is not None:
            self._absence.end()
            self._absence = None


__all__ = ["Holding"]
