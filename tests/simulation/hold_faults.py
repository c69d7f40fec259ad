"""Faults of schedules with an app that holds: nodes that do not reach each other, NATS that is away, who
joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fault import Undo, nothing, victim
from .hold import Peers
from .network_faults import all_servers_killed, host_isolated, isolated

if TYPE_CHECKING:
    from .host import Host
    from .world import Section, World


def peer_cut(world: World) -> Undo:
    """Two nodes do not reach each other without NATS, or one of them does not reach the other."""
    peers, rng = world.peers, world.rng
    one = victim(world).index
    other = (one + 1 + rng.randrange(len(world.hosts) - 1)) % len(world.hosts)
    both = [(one, other), (other, one)]
    return _cut(peers, rng.choice((both, both[:1], both[1:])))


def peer_isolated(world: World) -> Undo:
    """One node reaches no other."""
    one = victim(world).index
    others = [host.index for host in world.hosts if host.index != one]
    return _cut(world.peers, [(one, other) for other in others] + [(other, one) for other in others])


def _cut(peers: Peers, cells: list[tuple[int, int]]) -> Undo:
    for a, b in cells:
        peers.reaches[a][b] = False

    def undo() -> None:
        for a, b in cells:
            peers.reaches[a][b] = True

    return undo


def peers_slow(world: World) -> Undo:
    """Messages between nodes take long."""
    world.peers.slow = world.rng.choice((0.1, 0.6, 1.5))

    def undo() -> None:
        world.peers.slow = 0.0

    return undo


def promises_late(world: World) -> Undo:
    """A host loses NATS; what is sent to it comes later and later; then it loses the others."""
    host, rng = victim(world), world.rng
    undos: list[Undo] = [isolated(world, host.index)]

    def delay(seconds: float) -> None:
        if undos:
            world.peers.late[host.index] = seconds

    def lose_peers() -> None:
        others = [other.index for other in world.hosts if other is not host]
        if undos:
            undos.append(_cut(world.peers, [(host.index, other) for other in others]))

    at = rng.uniform(1.0, 3.0)
    for seconds in (0.4, 0.8, 1.2, 1.6):
        world.after(at, delay, seconds)
        at += rng.uniform(0.5, 1.0)
    world.after(at, lose_peers)

    def undo() -> None:
        world.peers.late[host.index] = 0.0
        for each in reversed(undos):
            each()
        undos.clear()

    return undo


def peer_messages_lost(world: World) -> Undo:
    """Some messages between nodes get lost."""
    world.peers.loss = world.rng.choice((0.1, 0.3, 0.7))

    def undo() -> None:
        world.peers.loss = 0.0

    return undo


def nats_gone(world: World) -> Undo:
    """NATS is wholly gone; the nodes reach each other."""
    return all_servers_killed(world)


def leader_without_nats(world: World) -> Undo:
    """The active node alone reaches no server; a third of the time another one is started again meanwhile."""
    undo = host_isolated(world)
    if world.rng.random() < 0.6:
        for _ in range(world.rng.choice((1, 1, 2))):
            world.after(world.rng.uniform(0.5, 4.0), _restart_another, world)
    return undo


def _restart_another(world: World) -> None:
    others = [
        h
        for h in world.hosts
        if h.node is not None and (not world.active or h.node is not world.active[-1].node)
    ]
    if others:
        node = world.rng.choice(others).node
        assert node is not None
        node.die("SIGKILL")


def member_forgotten(world: World) -> Undo:
    """An operator takes a node off the list, though it lives; its leader adds it again."""
    name = world.rng.choice(world.hosts).name
    world.nats.operator(lambda: world.nats.forget(name))
    return nothing


def expect_hold(world: World, until: float) -> None:
    """NATS is gone now, and nothing else is wrong but what may come: until *until* what is active goes on, if
    all are reached, and ends within two and a half TTLs if not."""
    section = world.active[-1] if world.active else None
    node = section.node if section is not None else None
    if (
        section is None
        or node is None
        or node.hold is None
        or node.hold.claim is None
        or section.state != "active"
    ):
        return
    claim = node.hold.claim
    others = [h for h in world.hosts if h.name in claim.asked]
    well = all(h.node is not None and h.node.settled_since() > 1.0 for h in (node.host, *others))
    if not (well and claim.is_known and section.serving):
        return
    world.after(until - world.now, _must_have_held, world, section, others)


def _must_have_held(world: World, section: Section, others: list[Host]) -> None:
    here, reaches = section.node.host.index, world.peers.reaches
    if all(reaches[here][other.index] and reaches[other.index][here] for other in others):
        if section.state != "active":
            world.fail("hold", f"the section of {section.epoch} has ended although all were reached")
        world.count("holds checked")
    else:
        if section.state != "ended":
            world.fail("hold", f"the section of {section.epoch} goes on although some are not reached")
        world.count("ends of a hold checked")


FAULTS = {
    peer_cut: 4,
    peer_isolated: 2,
    peers_slow: 3,
    promises_late: 4,
    peer_messages_lost: 2,
    nats_gone: 10,
    leader_without_nats: 14,
    member_forgotten: 3,
}
"""Fault → weight; beside those of every schedule."""
