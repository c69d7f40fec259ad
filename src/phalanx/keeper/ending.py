"""How what the node has running ends, and its session with it: first nothing runs, then it is released."""

from __future__ import annotations

import asyncio
import logging

from phalanx import system
from phalanx.keeper import fencing, wire
from phalanx.keeper.addresses import Prolonging
from phalanx.keeper.link import NodeLink
from phalanx.keeper.renewing import Renewer
from phalanx.keeper.wardens import Wardens
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")


class Ending:
    """Ends resources, the node, and the session. The order is the invariant: never release first."""

    def __init__(
        self,
        start: wire.Start,
        renewer: Renewer,
        registry: fencing.Registry,
        link: NodeLink,
        wardens: Wardens,
    ) -> None:
        self._start, self._renewer, self._registry = start, renewer, registry
        self._link, self._wardens = link, wardens
        self._prolonging: Prolonging | None = None

    def prolong_addresses(self) -> None:
        """Keep what is registered of them on this host, as a node would, until something ends."""
        if self._prolonging is None:
            holder, period = self._renewer.holder, self._start.timing.renew_every
            self._prolonging = Prolonging(self._registry.resources, lambda: holder.valid_until, period)

    async def stop_prolonging(self) -> None:
        """Return once nobody here puts an address anywhere. Twice is harmless."""
        prolonging, self._prolonging = self._prolonging, None
        if prolonging is not None:
            await prolonging.stop()

    async def end_resources(self, resources: list[Resource], *, kill_node: bool) -> None:
        """Return when *resources* (and the node) are gone.

        What does not die yet must not run without a session, if it can be held.
        """
        await self.stop_prolonging()
        killing = asyncio.create_task(self._kill(resources, kill_node), name="keeper kill")
        while not killing.done():
            await asyncio.wait({killing}, timeout=self._start.timing.renew_every)
            if not killing.done():
                self._renewer.tick()
        killing.result()
        for resource in resources:
            self._registry.remove(resource.id)

    async def end(self, reason: str, *, kill_node: bool) -> None:
        """Kill what must be gone, then end the session."""
        start, renewer = self._start, self._renewer
        await self.end_resources(self._registry.resources, kill_node=kill_node)
        self._wardens.dismiss()
        complete = await renewer.release(
            reason, by=f"keeper of {start.session.node}", deadline=system.now() + 2 * start.timing.ttl
        )
        if kill_node:
            await renewer.report_fenced(reason)
        if not complete:
            log.error("session %s: could not be released (%s); it expires instead", start.session, reason)
        self._link.say(wire.Released(complete))

    async def _kill(self, resources: list[Resource], kill_node: bool) -> None:
        """Return only when the node (if it is to be killed) and all registered processes are gone."""
        node, name = self._link.process, self._start.session.node
        known = fencing.Known()
        if kill_node:
            if node.lives():
                known = await fencing.find_processes(resources)
            node.kill()
        while not await fencing.kill_resources(resources, known):
            log.error("node %s: not releasing while processes of it still run", name)
        if kill_node:
            await node.gone()
            # Again: the last call of the dying node may have put one back.
            addresses = [resource for resource in resources if resource.kind == "vip"]
            while not await fencing.kill_resources(addresses):
                log.error("node %s: not releasing while its addresses are here", name)


__all__ = ["Ending"]
