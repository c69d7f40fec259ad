"""A node that ends in a pause: its keeper alone, as ``keeper.away``; its next life, as ``coord.takeup``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phalanx.decide.keeper import Fencing
from phalanx.decide.pause import kept
from phalanx.keeper.away import LOOK_SECONDS
from phalanx.types import Resource

from .host import PIPE
from .nats import UNANSWERED
from .things import PROGRAM, Ending, Thing

if TYPE_CHECKING:
    from .keeper import Keeper
    from .node import Node

APP = "app"
KNOCK_SECONDS = 0.05
PATIENCE_SECONDS = 8.0
"""How long a next life waits for a keeper that lives. Really it is longer."""


class Away:
    """What a keeper knows of a pause, and what it does without a node."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.keeps = False
        """The node leads, is active, and the app is paused: the keeper may outlive it."""
        self.has_door = False
        self.is_busy = False
        """It ends what does not outlive the node, and looks at nothing else meanwhile."""

    def on_keep(self, keeps: bool) -> None:
        """The node says so; it is noted in ``keeper.json``."""
        keeper = self._keeper
        keeper.on_beat()
        if not keeper.ending:
            self.keeps = keeps
            keeper.host.noted = keeper if keeps else None

    def on_leave(self, node: Node) -> None:
        """The node ends, and leaves what is to be kept."""
        keeper = self._keeper
        if not keeper.ending and node is keeper.node and not keeper.watchdog.is_away:
            keeper.world.count("nodes that left in a pause")
            self.begin(Fencing("the node leaves", kill_node=False))
            keeper.world.after(PIPE, node.run, node.on_left)

    def begin(self, why: Fencing) -> None:
        """From now on there is no node: end what goes with it, and hold the session for the rest."""
        keeper = self._keeper
        keeper.world.log(keeper.name, f"is alone: {why.reason}")
        if why.kill_node and keeper.node.alive:
            keeper.node.die(f"killed by its keeper: {why.reason}")
        self.is_busy = True
        things = {str(index): thing for index, thing in enumerate(keeper.host.registered)}
        known = [Resource("section", "section", APP, section.epoch) for section in keeper.registered]
        known += [self._resource(key, thing) for key, thing in things.items()]
        left = {resource.id for resource in kept(known, (APP,) if self.keeps else ())}
        ending = [thing for key, thing in things.items() if key not in left]
        Ending(ending, keeper, lambda: self._is_alone(ending)).step()

    def _resource(self, key: str, thing: Thing) -> Resource:
        is_program = thing.kind == PROGRAM
        adoptable = is_program and self._keeper.world.adoptable
        return Resource("unit" if is_program else "vip", key, APP, thing.section.epoch, adoptable=adoptable)

    def _is_alone(self, ended: list[Thing]) -> None:
        keeper = self._keeper
        for thing in ended:
            keeper.on_unregister_thing(thing)
        keeper.registered.clear()
        keeper.forget_node()
        keeper.watchdog.on_away(keeper.host.clock())
        self.is_busy, self.has_door = False, True
        keeper.world.count("keepers alone in a pause")
        if any(thing.present for thing in keeper.host.registered):
            keeper.world.count("programs that outlived their node in a pause")
        self._look()
        keeper.step()

    def _look(self) -> None:
        keeper, nats = self._keeper, self._keeper.nats
        if keeper.watchdog.is_away and not keeper.ending:
            nats.call(keeper, None, lambda: nats.bucket.pause, 1.0, self._looked)

    def _looked(self, pause: Any) -> None:
        keeper = self._keeper
        if not keeper.watchdog.is_away or keeper.ending:
            return
        if pause is not UNANSWERED and not pause[1] and keeper.world.rules.broken != "resumption-unheard":
            keeper.world.count("resumed while the node was away")
            keeper.end("resumed while the node is away")
            return
        keeper.timer(LOOK_SECONDS, self._look)

    def on_visit(self, node: Node) -> None:
        """The node's next life wants to go on with the session."""
        keeper = self._keeper
        open_for_all = keeper.world.rules.broken == "two-lives-take-up"
        if keeper.ending or not node.alive or not (self.has_door or open_for_all):
            return
        self.has_door = False
        keeper.world.count("sessions taken up by a next life")
        keeper.world.log(keeper.name, f"is taken up by life {node.life}")
        keeper.take_node(node)
        keeper.world.after(PIPE, node.run, node.on_attached, keeper)


def take_up(node: Node, since: float) -> None:
    """Knock at the keeper that may have outlived the node's earlier life; begin anew if there is none."""
    noted, world = node.host.noted, node.world
    if node.keeper is not None:
        return
    if noted is None or not noted.alive or world.now - since > PATIENCE_SECONDS:
        node.begin_anew()
        return
    if noted.away.has_door or world.rules.broken == "two-lives-take-up":
        world.after(PIPE, noted.run, noted.away.on_visit, node)
    node.timer(KNOCK_SECONDS, take_up, node, since)
