"""Faults of servers, links and messages: how each begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fault import Undo, nothing, victim

if TYPE_CHECKING:
    from .world import World


def server_down(world: World, index: int, *, lose: bool = False, wipe: bool = False) -> Undo:
    """A server dies. ``lose``, ``wipe``: it comes back without its last writes, or with nothing.

    It loses nothing when it is back within ``Timing.gap``: what a server wrote is lost by a machine that
    goes down, not by a process that is killed, and the design takes it that no machine boots that fast.
    """
    server = world.nats.servers[index]
    if not server.up:
        return nothing
    server.up = False
    server.life += 1
    died = world.now
    since = died - (world.rng.uniform(0.01, 3.0) if lose else 0.0)
    world.nats.changed()

    def undo() -> None:
        lost = 0
        slow_boot = world.now - died > 1.1 * world.timing.gap
        for stream in world.nats.streams.values():
            if stream.server == index and slow_boot:
                if wipe:
                    stream.wipe()
                    world.count("session streams wiped")
                elif lose:
                    lost += stream.lose(since)
        if lost:
            world.count("servers back without their last writes")
            world.log("nats", f"server {index} is back without its last {lost} writes")
        server.up = True
        world.nats.changed()

    return undo


def server_killed(world: World) -> Undo:
    """A server dies and comes back as it was."""
    return server_down(world, world.rng.randrange(3))


def server_amnesia(world: World) -> Undo:
    """A server dies and comes back without its last writes."""
    return server_down(world, world.rng.randrange(3), lose=True)


def server_wiped(world: World) -> Undo:
    """A server dies and comes back empty."""
    return server_down(world, world.rng.randrange(3), wipe=True)


def all_servers_killed(world: World) -> Undo:
    """NATS is wholly gone."""
    undos = [server_down(world, index) for index in range(3)]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def _cut(world: World, rows: list[list[bool]], cells: list[tuple[int, int]]) -> Undo:
    cells = [(a, b) for a, b in cells if rows[a][b]]
    for a, b in cells:
        rows[a][b] = False
    world.nats.changed()

    def undo() -> None:
        for a, b in cells:
            rows[a][b] = True
        world.nats.changed()

    return undo


def link_cut(world: World) -> Undo:
    """One host does not reach one server."""
    return _cut(world, world.nats.link, [(victim(world).index, world.rng.randrange(3))])


def host_isolated(world: World) -> Undo:
    """One host reaches no server."""
    return isolated(world, victim(world).index)


def isolated(world: World, index: int) -> Undo:
    """That host reaches no server."""
    return _cut(world, world.nats.link, [(index, s) for s in range(3)])


def host_with_one_server(world: World) -> Undo:
    """A split: one host and one server on their side."""
    index, server = victim(world).index, world.rng.randrange(3)
    links = [(index, s) for s in range(3) if s != server] + [
        (h.index, server) for h in world.hosts if h.index != index
    ]
    undo_links = _cut(world, world.nats.link, links)
    undo_routes = _cut(world, world.nats.route, _around(server))

    def undo() -> None:
        undo_links()
        undo_routes()

    return undo


def _around(server: int) -> list[tuple[int, int]]:
    return [(server, s) for s in range(3) if s != server] + [(s, server) for s in range(3) if s != server]


def server_isolated(world: World) -> Undo:
    """One server has no routes, but still has clients."""
    return _cut(world, world.nats.route, _around(world.rng.randrange(3)))


def route_cut(world: World) -> Undo:
    """Two servers do not reach each other."""
    a = world.rng.randrange(3)
    b = (a + 1 + world.rng.randrange(2)) % 3
    return _cut(world, world.nats.route, [(a, b), (b, a)])


def _slow(values: list[float], index: int, amount: float) -> Undo:
    values[index] = amount

    def undo() -> None:
        values[index] = 0.0  # not what was there before: of two that overlap, one would stay for ever

    return undo


def host_slow(world: World) -> Undo:
    """Requests of one host take long, some longer than their sender waits."""
    return _slow(world.nats.slow_host, victim(world).index, world.rng.choice((0.05, 0.2, 0.6)))


def server_slow(world: World) -> Undo:
    """One server is slow."""
    return _slow(world.nats.slow_server, world.rng.randrange(3), world.rng.choice((0.05, 0.2, 0.6)))


def replies_slow_then_isolated(world: World) -> Undo:
    """Replies to one host take long; then it is cut off."""
    index = victim(world).index
    undo_slow = _slow(world.nats.slow_replies, index, 0.38)
    undos: list[Undo] = [undo_slow]

    def cut() -> None:
        if undos:  # else it is over already
            undos.append(_cut(world, world.nats.link, [(index, s) for s in range(3)]))

    world.after(world.rng.uniform(0.6, 2.0), cut)

    def undo() -> None:
        for each in reversed(undos):
            each()
        undos.clear()

    return undo


def _set(target: object, name: str, value: float) -> Undo:
    setattr(target, name, value)
    return lambda: setattr(target, name, 0.0)


def messages_lost(world: World) -> Undo:
    """Some requests get lost."""
    return _set(world.nats, "loss", world.rng.choice((0.05, 0.2, 0.5)))


def replies_lost(world: World) -> Undo:
    """Some writes are stored, but nobody says so."""
    return _set(world.nats, "lost_replies", world.rng.choice((0.05, 0.2, 0.5)))


def refusals(world: World) -> Undo:
    """Some compare-and-sets are refused without reason."""
    return _set(world.nats, "spurious", world.rng.choice((0.02, 0.1, 0.3)))


def watch_lags(world: World) -> Undo:
    """One node's watches lag."""
    node = world.rng.choice(world.hosts).node
    return _set(node, "watch_lag", world.rng.choice((0.1, 0.5, 2.5))) if node is not None else nothing


def watch_drops(world: World) -> Undo:
    """One node misses some messages without being told."""
    node = world.rng.choice(world.hosts).node
    return _set(node, "watch_drop", world.rng.choice((0.1, 0.5, 1.0))) if node is not None else nothing


def streams_replaced(world: World) -> Undo:
    """One or two session streams are replaced; a third of the time while a node hears of it late."""
    rng, nats = world.rng, world.nats
    nodes = [h.node for h in world.hosts if h.node is not None and h.node.alive and h.node.session_valid()]
    if not nodes or nats.bucket.streams.is_joint:
        return nothing
    node = rng.choice(nodes)
    names = list(nats.bucket.streams.streams)
    for index in rng.sample(range(3), rng.choice((1, 2, 2))):
        new = f"s{len(nats.streams) + 1}"
        nats.create(new, nats.streams[names[index]].server)
        names[index] = new
    undo = nothing
    late = world.active[-1].node if world.active else None
    if late is not None and late is not node and rng.random() < 0.5:
        undo = _set(late, "watch_lag", rng.uniform(2.0, 5.0))
    node.run(node.repair.replace, tuple(names))
    return undo
