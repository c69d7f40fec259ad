"""Which faults one schedule has, and how each of them begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from .host import Host, Process
from .node import Node
from .things import Thing
from .world import Section

if TYPE_CHECKING:
    from .world import World

Undo = Callable[[], None]


def victim(world: World) -> Host:
    """Mostly the host of the active node: that is where promises break."""
    rng = world.rng
    if world.active and rng.random() < 0.65:
        return world.active[-1].node.host
    return rng.choice(world.hosts)


def _kill(process: Process | None, how: str = "SIGKILL") -> None:
    if process is not None:
        process.die(how)


def _nothing() -> None:
    pass


# --- processes


def node_killed(world: World) -> Undo:
    """SIGKILL of a node. Where nothing else is wrong its session must be over at once (G4)."""
    node = victim(world).node
    if node is None or not node.alive:
        return _nothing
    keeper, since = node.keeper, world.disturbances
    calm = (
        world.faults_active == 1
        and node.established
        and keeper is not None
        and keeper.alive
        and not keeper.stopped
        and not keeper.ending
        and world.nats.connected(keeper)
    )
    node.die("SIGKILL")
    if calm:
        world.after(0.8, _must_be_over, world, node, since)
    return _nothing


def _must_be_over(world: World, node: Node, since: int) -> None:
    if world.disturbances != since:
        return
    if node.session not in world.over_at:
        world.fail(
            "G4", f"{node.session} is not over 0.8 s after its node was killed, with nothing else wrong"
        )
    world.count("G4 checked")


def keeper_killed(world: World) -> Undo:
    """SIGKILL of a keeper."""
    _kill(victim(world).keeper)
    return _nothing


def both_killed(world: World) -> Undo:
    """SIGKILL of both at once."""
    host = victim(world)
    _kill_both(host)
    return _nothing


def _kill_both(host: Host) -> None:
    keeper, world = host.keeper, host.world
    _kill(keeper)
    _kill(host.node)
    warden = keeper.warden if keeper is not None else None
    if warden is not None and warden.alive and not warden.stopped:
        world.after(0.5, _must_be_gone, world, warden, list(host.registered), world.disturbances)


def _must_be_gone(world: World, warden: Process, things: list[Thing], since: int) -> None:
    if world.disturbances == since:
        if any(thing.present for thing in things):
            world.fail("warden", f"something of {warden.host.name} runs 0.5 s after both were killed")
        world.count("wardens checked")


def warden_killed(world: World) -> Undo:
    """SIGKILL of a warden; half of the time of node and keeper too, before there is another one."""
    host = victim(world)
    if host.keeper is not None:
        _kill(host.keeper.warden)
    if world.rng.random() < 0.5:
        world.after(world.rng.choice((0.0, 0.5)), _kill_both, host)
    return _nothing


def host_died(world: World) -> Undo:
    """Power loss of a machine, with its NATS server if it has one."""
    host = victim(world)
    host.up = False
    host.power_off()
    if host.keeper is not None:
        _kill(host.keeper.warden, "host")
    _kill(host.keeper, "host")
    _kill(host.node, "host")
    back = server_down(world, host.index, lose=world.rng.random() < 0.5) if host.index < 3 else _nothing

    def undo() -> None:
        back()
        host.up = True
        host.start_soon()

    return undo


def _stopped(processes: list[Process | None]) -> Undo:
    held = [p for p in processes if p is not None and p.alive]
    for process in held:
        process.stop()

    def undo() -> None:
        for process in held:
            if process.alive:
                process.resume()

    return undo


def node_stopped(world: World) -> Undo:
    """SIGSTOP of a node."""
    return _stopped([victim(world).node])


def keeper_stopped(world: World) -> Undo:
    """SIGSTOP of a keeper."""
    return _stopped([victim(world).keeper])


def both_stopped(world: World) -> Undo:
    """The whole machine stands still, but for its clock. Whoever wakes first is random."""
    host = victim(world)
    both: list[Process | None] = [host.node, host.keeper]
    if host.keeper is not None and world.rng.random() < 0.5:
        both.append(host.keeper.warden)
    world.rng.shuffle(both)
    return _stopped(both)


def loop_blocked(world: World) -> Undo:
    """User code blocks the event loop."""
    node = victim(world).node
    if node is None or not node.alive or node.blocked:
        return _nothing
    node.blocked = True
    return lambda: node.unblock() if node.alive else None


def slow_end(world: World) -> Undo:
    """The hooks of the present node take long to end."""
    node = victim(world).node
    if node is not None:
        node.end_takes = world.rng.choice((0.3, 0.6, 3.0))
    return _nothing


def section_fails(world: World) -> Undo:
    """A program or a check of the active section fails."""
    if world.active:
        node = world.active[-1].node
        node.run(node.fail)
    return _nothing


def app_paused(world: World) -> Undo:
    """An operator pauses the app, and resumes it."""
    nats, over = world.nats, False
    if nats.bucket.pause[1]:
        return _nothing
    nats.operator(lambda: nats.set_pause(True), lambda: not over)

    def undo() -> None:
        nonlocal over
        over = True
        if not nats.bucket.pause[1]:
            return
        if not world.active:
            world.count("pauses that ended while nobody was active")
        nats.operator(lambda: nats.set_pause(False))
        ready = any(h.node.settled_since() > 2.5 and not h.no_failover for h in world.hosts if h.node)
        calm = world.faults_active == 1 and world.calm_for > 3.0 and world.now >= nats.bucket.ready_at + 1.5
        if calm and ready:
            world.after(2.5, _must_be_led, world, world.disturbances, world.last_epoch)

    return undo


def _must_be_led(world: World, since: int, before: int) -> None:
    if world.disturbances == since:
        if not world.active and world.last_epoch == before:
            world.fail("G9", "nobody is active 2.5 s after a pause has ended, with nothing else wrong")
        world.count("resumptions checked")


def nomination(world: World) -> Undo:
    """An operator names a successor; two times of three the active node is asked to hand over then."""
    rng, nats = world.rng, world.nats
    names = [host.name for host in world.hosts if not world.active or host is not world.active[-1].node.host]
    name = rng.choice(names)
    nats.operator(lambda: nats.nominate(name))
    world.count("nominations")
    if rng.random() < 0.67:
        world.after(rng.choice((0.01, 0.3)), _ask_to_step_down, world)
    return _nothing


def _ask_to_step_down(world: World) -> None:
    stepdown(world)


def stepdown(world: World) -> Undo:
    """An operator hands the app over."""
    if world.active:
        node = world.active[-1].node
        _expect_hand_over(world, node)
        node.run(node.hand_over)
    return _nothing


def _expect_hand_over(world: World, node: Node) -> None:
    """G10: with nothing else wrong, a named successor is active soon after the old section's end."""
    nats, section = world.nats, node.section
    others = [h.node for h in world.hosts if h.node is not None and h.node is not node]
    calm = (
        world.faults_active == 1
        and world.calm_for > 2.6  # sessions are fresh again, and no watch still lags
        and world.now >= nats.bucket.ready_at + 1.5
        and section is not None
        and section.state == "active"
        and node.may_work
        and not node.blocked
        and bool(others)
        and all(n.settled_since() > 2.5 for n in (node, *others))
        and node.end_takes < 0.5
        and not nats.bucket.pause[1]
    )
    if calm and section is not None:
        world.after(
            (node.end_takes + section.stop_takes) / 0.95 + 0.4,
            _must_be_handed_over,
            world,
            section,
            world.disturbances,
        )


def _must_be_handed_over(world: World, old: Section, since: int) -> None:
    if world.disturbances != since:
        return
    successor = old.successor
    following = next((section for section in world.begun if section.epoch > old.epoch), None)
    wanted = _wanted_successor(world, old)
    if wanted is None:
        return
    if successor is None:
        world.fail("G10", f"{old.node.name} named no successor although the others were healthy")
    if successor != wanted:
        world.fail("G10", f"{old.node.name} named {successor} although {wanted} was preferred")
    if following is None or following.node.host.name != successor:
        world.fail("G10", f"{old.node.name} named {successor}, who is not active soon after")
    world.count("G10 checked")


def _wanted_successor(world: World, old: Section) -> str | None:
    """Whom it had to name, all being well: an operator's nominee, else the one of highest priority."""
    now = world.nats.bucket.nomination[1]
    others = [host for host in world.hosts if host is not old.node.host]
    if now.epoch == old.epoch and any(host.name == now.node for host in others):
        return now.node
    offering = [host for host in others if not host.no_failover]
    return min(offering, key=lambda host: (-host.priority, host.name)).name if offering else None


def sigterm(world: World) -> Undo:
    """A node is told to end."""
    node = victim(world).node
    if node is not None:
        _expect_hand_over(world, node)
        node.run(node.terminate)
    return _nothing


def connection_kicked(world: World) -> Undo:
    """A connection to NATS is cut; it comes back by itself."""
    host = victim(world)
    process: Process | None = world.rng.choice((host.node, host.keeper))
    if process is not None and process.alive:
        process.run(process.disconnect)
    return _nothing


# --- servers and links


def server_down(world: World, index: int, *, lose: bool = False, wipe: bool = False) -> Undo:
    """A server dies. ``lose``, ``wipe``: it comes back without its last writes, or with nothing.

    It loses nothing when it is back within ``Timing.gap``: what a server wrote is lost by a machine that
    goes down, not by a process that is killed, and the design takes it that no machine boots that fast.
    """
    server = world.nats.servers[index]
    if not server.up:
        return _nothing
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
    index = victim(world).index
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
    return _set(node, "watch_lag", world.rng.choice((0.1, 0.5, 2.5))) if node is not None else _nothing


def watch_drops(world: World) -> Undo:
    """One node misses some messages without being told."""
    node = world.rng.choice(world.hosts).node
    return _set(node, "watch_drop", world.rng.choice((0.1, 0.5, 1.0))) if node is not None else _nothing


def streams_replaced(world: World) -> Undo:
    """One or two session streams are replaced; a third of the time while a node hears of it late."""
    rng, nats = world.rng, world.nats
    nodes = [h.node for h in world.hosts if h.node is not None and h.node.alive and h.node.session_valid()]
    if not nodes or nats.bucket.streams.is_joint:
        return _nothing
    node = rng.choice(nodes)
    names = list(nats.bucket.streams.streams)
    for index in rng.sample(range(3), rng.choice((1, 2, 2))):
        new = f"s{len(nats.streams) + 1}"
        nats.create(new, nats.streams[names[index]].server)
        names[index] = new
    undo = _nothing
    late = world.active[-1].node if world.active else None
    if late is not None and late is not node and rng.random() < 0.5:
        undo = _set(late, "watch_lag", rng.uniform(2.0, 5.0))
    node.run(node.replace_streams, tuple(names))
    return undo


FAULTS: dict[Callable[[World], Undo], float] = {
    node_killed: 3,
    keeper_killed: 2,
    both_killed: 3,
    warden_killed: 3,
    host_died: 2,
    node_stopped: 3,
    keeper_stopped: 3,
    both_stopped: 2,
    loop_blocked: 2,
    slow_end: 1.5,
    section_fails: 1.5,
    app_paused: 5,
    nomination: 2.5,
    stepdown: 3,
    sigterm: 2,
    connection_kicked: 2,
    server_killed: 3,
    server_amnesia: 3,
    server_wiped: 1,
    all_servers_killed: 0.7,
    link_cut: 2,
    host_isolated: 4,
    host_with_one_server: 2,
    server_isolated: 2,
    route_cut: 2,
    host_slow: 2,
    server_slow: 2,
    replies_slow_then_isolated: 2.5,
    messages_lost: 2,
    replies_lost: 2,
    refusals: 2,
    watch_lags: 2,
    watch_drops: 2,
    streams_replaced: 2.5,
}
"""Fault → weight."""


class Plan:
    """The faults of one schedule, each with its beginning and its end."""

    def __init__(self, world: World, chaos_from: float, chaos_until: float) -> None:
        self.world = world
        self._undos: dict[int, Undo] = {}
        self._disturbed_at = -9.0
        rng: Random = world.rng
        if chaos_until > 6.5 and rng.random() < 0.06:
            self._pause_in_peace(chaos_from, chaos_until)
            return
        kinds, weights = list(FAULTS), list(FAULTS.values())
        for number in range(rng.choice((1, 2, 3, 3, 4, 5, 6))):
            fault = rng.choices(kinds, weights)[0]
            at = rng.uniform(chaos_from, chaos_until - 1.0)
            lasts = rng.choice((rng.uniform(0.1, 1.5), rng.uniform(1.7, 5.0)))
            world.at(at, self._begin, number, fault)
            if at + lasts < chaos_until:
                world.at(at + lasts, self._end, number, fault.__name__)

    def _pause_in_peace(self, chaos_from: float, chaos_until: float) -> None:
        """A pause in which one thing happens, and long nothing: what must be so after it can be checked."""
        world, rng = self.world, self.world.rng
        at = rng.uniform(chaos_from, chaos_until - 5.2)
        world.at(at, self._begin, 0, app_paused)
        fault = rng.choice((node_killed, section_fails, sigterm, connection_kicked))
        world.at(at + 0.3, self._begin, 1, fault)
        world.at(at + 0.4, self._end, 1, fault.__name__)
        world.at(at + 4.0, self._end, 0, app_paused.__name__)

    def _begin(self, number: int, fault: Callable[[World], Undo]) -> None:
        world = self.world
        world.disturbances += 1
        world.faults_active += 1
        world.calm_for, self._disturbed_at = world.now - self._disturbed_at, world.now
        world.count(f"fault {fault.__name__}")
        world.log("FAULT", fault.__name__)
        self._undos[number] = fault(world)

    def _end(self, number: int, name: str) -> None:
        undo = self._undos.pop(number, None)
        if undo is not None:
            world = self.world
            world.disturbances += 1
            world.calm_for, self._disturbed_at = world.now - self._disturbed_at, world.now
            world.log("FAULT", f"{name} is over")
            undo()
            self.world.faults_active -= 1

    def heal(self) -> None:
        """End every fault, and whatever else would keep the platform from recovering."""
        world, nats = self.world, self.world.nats
        for number in sorted(self._undos, reverse=True):
            self._end(number, f"#{number}")
        nats.link = [[True] * 3 for _ in nats.link]
        nats.route = [[True] * 3 for _ in nats.route]
        nats.slow_host = [0.0] * len(nats.slow_host)
        nats.slow_replies = [0.0] * len(nats.slow_replies)
        nats.slow_server = [0.0] * 3
        nats.loss = nats.lost_replies = nats.spurious = 0.0
        nats.changed()
        for host in world.hosts:
            host.up = True
            warden = host.keeper.warden if host.keeper is not None else None
            for process in (warden, host.keeper, host.node):
                if process is not None and process.alive:
                    if isinstance(process, Node):
                        process.watch_lag = process.watch_drop = 0.0
                        process.end_takes = 0.05
                        if process.blocked:
                            process.unblock()
                    if process.stopped:
                        process.resume()
            if host.node is None or not host.node.alive:
                host.start_soon()
