"""Running one schedule."""

from __future__ import annotations

from tests.schedules import Outcome, outcome_of

from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing

from .breaks import Rules
from .hold import Peers
from .host import Host
from .nats import Nats
from .plan import Plan
from .world import World

HEAL_BOUND = 14.0
"""Seconds after the last fault within which somebody must be active again: restart of the processes, an
election of the bucket, two sessions that expire one after the other."""


def build(seed: int, broken: str = "", *, tracing: bool = False, holds: bool = False) -> World:
    """The platform of one schedule, before it starts. *holds*: its app holds when NATS is lost."""
    world = World(seed, Rules(broken), tracing=tracing)
    world.holds = holds or broken.startswith("hold-")
    rng = world.rng
    renew_every = rng.choice((0.5,) * 8 + (0.4,) * 3 + (0.2,))
    if world.holds:
        renew_every = 0.2  # as a declaration must have it: else it stands down before it has asked
    world.timing = Timing.of(2.0, renew_every=renew_every, stall_limit=rng.choice((0.8, 2.0)))
    hosts = rng.choice((2, 2, 3, 3, 3, 4, 5))
    world.nats = Nats(world, hosts, StreamList(1, ("s1", "s2", "s3")))
    world.hosts = [Host(world, index) for index in range(hosts)]
    world.peers = Peers(world, hosts)
    world.adoptable = not world.holds and rng.random() < 0.4
    world.away_seconds = rng.choice((2.5, 600.0, 600.0))
    declaring = rng.choice((0.0, 0.0, 0.6, 1.0))
    for host in world.hosts:
        host.has_command = rng.random() < declaring
        if world.holds and host.index and rng.random() < 0.15:
            world.at(rng.uniform(2.0, 8.0), host.start_soon)  # it joins later
        else:
            host.start_soon(0.4)
    return world


def _drive(world: World) -> None:
    chaos_until = world.rng.uniform(12.0, 16.0) if world.holds else world.rng.uniform(5.0, 10.0)
    plan = Plan(world, 1.2, chaos_until)
    _resync(world)
    world.run(chaos_until)
    world.log("FAULT", "everything is healed")
    plan.heal()
    healed = world.now

    def recovered() -> bool:
        return any(s.node.alive and s.state == "active" and s.serving for s in world.active)

    if not world.run(healed + HEAL_BOUND, recovered):
        world.fail("G9", f"nobody serves {HEAL_BOUND} s after everything was healed")
    if not world.run(world.now + 5.0, world.nothing_left):
        world.fail("G1", "something of an ended section is left 5 s after all is well")
    world.count("recoveries checked")
    for host in world.hosts:
        if host.node is not None and host.node.alive:
            host.node.run(host.node.repair.take_over)
    world.run(world.now + 0.4)


def _resync(world: World) -> None:
    for host in world.hosts:
        if host.node is not None and host.node.alive:
            host.node.run(host.node.watches.resync)
    world.after(world.rng.uniform(3.0, 5.0), _resync, world)


def run_one(seed: int, broken: str = "", *, tracing: bool = False, holds: bool = False) -> Outcome:
    """One schedule, from its seed."""
    world = build(seed, broken, tracing=tracing, holds=holds)
    return outcome_of(world, lambda: _drive(world))
