"""Running one schedule."""

from __future__ import annotations

from collections.abc import Callable

from tests.schedules import Outcome, outcome_of

from .node import Node
from .world import World

HEAL_BOUND = 14.0
"""Seconds after the last fault within which every partition is owned by the right number of nodes: deaf
hooks, sessions that expire one after the other, the longest settling of members."""

SETTLED_SECONDS = 1.5
"""What is settled stays so for this long: longer than members that come take to be planned in."""


class Hosts:
    """Starts nodes, and does to them what happens to nodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lives = [0] * world.rng.choice((2, 3, 3, 3, 4, 5))
        world.hosts = len(self.lives)
        self.weights = [world.rng.choice((1, 1, 1, 2, 3)) if world.seed % 3 == 0 else 1 for _ in self.lives]
        self.gone: int | None = None
        """A host that has not come back when all is healed."""
        self.now: list[Node | None] = [None] * len(self.lives)
        self.chaos_until = world.rng.uniform(4.0, 9.0)
        for host in range(len(self.lives)):
            world.after(world.rng.uniform(0.0, 0.4), self.start, host)
        world.after(world.rng.uniform(0.5, 1.5), self.disturb)

    def start(self, host: int) -> None:
        """A node begins there, unless one lives."""
        before = self.now[host]
        if before is not None and before.alive:
            return
        if host == self.gone:
            return
        self.lives[host] += 1
        node = Node(self.world, host, self.lives[host], self.weights[host])
        self.world.nodes = [n for n in self.world.nodes if n.alive or n.keeper_runs] + [node]
        self.now[host] = node
        self.world.log(node.name, f"starts as {node.session.id}")
        node.step()

    def supervise(self) -> None:
        """Whoever has died is started again, sooner or later."""
        for host, node in enumerate(self.now):
            if node is not None and not node.alive:
                self.world.after(self.world.rng.uniform(0.05, 2.0), self.start, host)

    def disturb(self) -> None:
        """One fault; the next one follows."""
        world, rng = self.world, self.world.rng
        if world.now >= self.chaos_until:
            return
        node = rng.choice(self.now)
        if node is not None and node.alive:
            fault = rng.choice(FAULTS)
            world.count(f"fault {fault.__name__.strip('_')}")
            fault(self, node)
        self.supervise()
        world.after(rng.choice((0.0, 0.02, 0.1, 0.3, 0.6, 1.0)), self.disturb)

    def lose_for_good(self) -> None:
        """Now and then a host is never seen again."""
        if self.world.rng.random() < 0.3:
            self.gone = self.world.rng.randrange(len(self.now))
            self.world.count("a host is lost for good")
            self.world.hosts -= 1
            node = self.now[self.gone]
            if node is not None:
                node.keeper_runs = False
                node.die("its host is lost for good")

    def heal(self) -> None:
        """No more faults; every host that is left has a node that may own its share."""
        world = self.world
        self.lose_for_good()
        world.calm, world.unavailable_until = True, 0.0
        world.log("FAULT", "everything is healed")
        left = [host for host in range(len(self.now)) if host != self.gone]
        if not any(self.weights[host] for host in left):
            self.weights[left[0]] = 1  # where nobody has a weight everything may stay as it is
        for host, node in enumerate(self.now):
            if node is not None and node.alive:
                node.weight = self.weights[host]
                if node.cut_off:
                    node.reconnected()
                node.ready = True
                node.lag(0.0)
        self._revive()

    def _revive(self) -> None:
        for host in range(len(self.now)):
            self.start(host)
        self.world.after(0.5, self._revive)


def _crash(hosts: Hosts, node: Node) -> None:
    node.die("SIGKILL")


def _lose_host(hosts: Hosts, node: Node) -> None:
    node.keeper_runs = False
    node.die("its host is lost")


def _stop(hosts: Hosts, node: Node) -> None:
    node.terminate()


def _freeze_node(hosts: Hosts, node: Node) -> None:
    node.freeze(hosts.world.rng.uniform(0.05, 3.0), host=False)


def _freeze_host(hosts: Hosts, node: Node) -> None:
    node.freeze(hosts.world.rng.uniform(0.05, 6.0), host=True)


def _cut_off(hosts: Hosts, node: Node) -> None:
    node.cut_off = True
    hosts.world.after(hosts.world.rng.uniform(0.05, 4.0), node.reconnected)


def _lag(hosts: Hosts, node: Node) -> None:
    node.lag(hosts.world.rng.uniform(0.05, 1.0))


def _reweigh(hosts: Hosts, node: Node) -> None:
    hosts.weights[node.host] = node.weight = hosts.world.rng.choice((0, 1, 1, 2, 5))
    node.do(node.step)


def _fall_ill(hosts: Hosts, node: Node) -> None:
    node.ready = False
    node.do(node.step)

    def recover() -> None:
        node.ready = True
        node.do(node.step)

    hosts.world.after(hosts.world.rng.uniform(0.05, 2.0), recover)


def _election_of_the_stream(hosts: Hosts, node: Node) -> None:
    world = hosts.world
    world.unavailable_until = max(world.unavailable_until, world.now + world.rng.uniform(0.2, 1.5))


FAULTS: tuple[Callable[[Hosts, Node], None], ...] = (
    _crash,
    _crash,
    _lose_host,
    _stop,
    _stop,
    _freeze_node,
    _freeze_host,
    _cut_off,
    _lag,
    _reweigh,
    _fall_ill,
    _election_of_the_stream,
)


def _drive(world: World) -> None:
    hosts = Hosts(world)
    world.run(hosts.chaos_until)
    hosts.heal()
    _recover(world)


def _recover(world: World) -> None:
    """Liveness: every partition has its owner, each node its share, and that stays so."""
    bound = world.now + HEAL_BOUND
    while world.run(bound, world.settled):
        settled_at = world.now
        if not world.run(settled_at + SETTLED_SECONDS, lambda: not world.settled()):
            world.count("recoveries checked")
            return
    world.fail("liveness", f"not every partition has its owner {HEAL_BOUND} s after all was healed")


def run_one(seed: int, broken: str = "", *, tracing: bool = False) -> Outcome:
    """One schedule, from its seed."""
    world = World(seed, broken, tracing=tracing)
    return outcome_of(world, lambda: _drive(world))
