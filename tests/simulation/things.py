"""What a section has on its host beside the node's own code: a program and an address; and who ends them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx.keeper.fencing import ADDRESSES_WAIT_SECONDS

from .host import Process

if TYPE_CHECKING:
    from .host import Host
    from .keeper import Keeper
    from .world import Section

PROGRAM, ADDRESS = "program", "address"

POLL = 0.01
LOCK_POLL = 0.02
LOCK_PATIENCE, LOCK_WAIT = 1.0, 4.0
"""As in ``keeper/warden.py``: when the keeper of an earlier life is killed, when its successor gives up."""
RESPAWN = 1.1
"""Between a warden's death and the next one's start."""


class Thing:
    """A program or an address of one section. ``present``: it runs, or is on the interface."""

    __slots__ = ("dying", "expires", "host", "kind", "late", "present", "section")

    def __init__(self, section: Section, kind: str) -> None:
        self.section, self.kind = section, kind
        self.host: Host = section.node.host
        self.present = self.dying = self.late = False
        self.expires = math.inf

    def appear(self) -> None:
        """It is started, or put on the interface."""
        self.present = True
        self.host.world.log(self.host.name, f"{self.kind} of epoch {self.section.epoch} is here")
        self.host.world.thing_appears(self)

    def vanish(self, how: str) -> None:
        """Nothing is left of it."""
        if self.present:
            self.present = False
            self.host.world.log(self.host.name, f"{self.kind} of epoch {self.section.epoch} is gone: {how}")

    def kill(self) -> None:
        """SIGKILL, or its removal: obeyed soon, but not at once."""
        if self.present and not self.dying:
            world, keeper = self.host.world, self.section.node.keeper
            self.dying = True
            if keeper is not None:
                due = keeper.watchdog.kill_at(keeper.ends_at)
                self.late = self.host.clock() > due + 0.01
            longest = 0.08 if self.kind == PROGRAM else 0.005
            world.after(world.rng.uniform(0.001, longest), self.vanish, "killed")

    def prolong(self, seconds: int) -> None:
        """The kernel removes it after that many seconds of its own clock, or up to a second later."""
        world = self.host.world
        first = self.expires == math.inf
        self.expires = world.now + (seconds + world.rng.random()) / self.host.rate
        if first:
            world.at(self.expires, self._expire)

    def _expire(self) -> None:
        world = self.host.world
        if not self.present:
            return
        if world.now < self.expires:
            world.at(self.expires, self._expire)
            return
        world.count("addresses removed by the kernel")
        self.vanish("its lifetime is over")
        node = self.section.node
        node.run(node.app.address_lost, self.section)

    @property
    def is_guarded(self) -> bool:
        """Whether somebody is there who has to end it, or has said that it is gone."""
        node, keeper = self.section.node, self.section.node.keeper
        if self.late:  # those who had to were dead or stood still when the session ran out
            return False
        if self.dying or (node.may_work and not node.blocked and node.app.section is self.section):
            return True
        if keeper is None:
            return False
        if keeper.alive:
            return keeper.vouched or not keeper.stopped
        warden = keeper.warden
        return keeper.vouched or (warden is not None and warden.alive and not warden.stopped)


class Ending:
    """Programs first, then the addresses, which do not wait long. As ``keeper/fencing.py``."""

    def __init__(self, things: list[Thing], agent: Process | None, done: Callable[[], None]) -> None:
        self._things, self._agent, self._done = things, agent, done
        self._programs = [thing for thing in things if thing.kind == PROGRAM]
        self._waited = 0.0

    def step(self) -> None:
        """Kill what is there; again until nothing is."""
        for thing in self._programs:
            thing.kill()
        if self._waited > ADDRESSES_WAIT_SECONDS or not any(thing.present for thing in self._programs):
            for thing in self._things:
                thing.kill()
        if not any(thing.present for thing in self._things):
            self._done()
            return
        self._waited += POLL
        if self._agent is not None:
            self._agent.timer(POLL, self.step)
        else:
            self._things[0].host.world.after(POLL, self.step)


def end_by_node(things: list[Thing]) -> None:
    """A node that fences itself: it goes on as a process until that is done, whatever becomes of its life."""
    if things:
        Ending(things, None, lambda: None).step()


class Warden(Process):
    """Ends what its keeper had registered, if the keeper dies without having done so."""

    kind = "warden"

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper.host)
        self.keeper = keeper
        self.name = f"{keeper.host.name} warden"

    def on_keeper_died(self) -> None:
        """The other end of its socket is closed."""
        left = self.host.registered
        if any(thing.present for thing in left):
            self.world.count("things ended by a warden")
        if self.world.rules.broken == "warden-sleeps":
            return
        Ending(list(left), self, self._all_gone).step()

    def _all_gone(self) -> None:
        self.alive = False

    def on_death(self, how: str) -> None:
        """Its keeper starts another one."""
        keeper = self.keeper
        if keeper.alive and not keeper.vouched:
            keeper.timer(RESPAWN, keeper.start_warden)


class Lock:
    """``warden.lock``: held by a keeper and its warden together, until what they had registered is gone."""

    def __init__(self) -> None:
        self._keeper: Keeper | None = None

    @property
    def holder(self) -> Keeper | None:
        """The keeper of whose life something may be left."""
        keeper = self._keeper
        if keeper is None or keeper.vouched:
            return None
        warden = keeper.warden
        return keeper if keeper.alive or (warden is not None and warden.alive) else None

    def take(self, keeper: Keeper, since: float) -> None:
        """Try until it is free; then kill what is left over, and only then begin."""
        if keeper.node.keeper is not keeper or not keeper.node.alive:
            keeper.die("its node has ended before it began")
            return
        old, waited = self.holder, keeper.world.now - since
        if old is None:
            self._keeper = keeper
            keeper.start_warden()
            left = keeper.host.registered
            if any(thing.present for thing in left):
                keeper.world.count("left-overs ended by the next keeper")
            if keeper.world.rules.broken == "left-overs-ignored":
                left.clear()
            Ending(list(left), keeper, keeper.begin).step()
            return
        if waited > LOCK_PATIENCE and old.alive:
            old.die("an earlier life's keeper")
        if waited > LOCK_WAIT:
            keeper.node.die("what an earlier life has left is not gone")
            return
        keeper.timer(LOCK_POLL, self.take, keeper, since)
