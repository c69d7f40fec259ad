"""Faults of processes and machines, and what operators do: how each begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.types import FenceNote

from .fault import Undo, nothing, victim
from .host import Host, Process
from .keeper import Keeper
from .network_faults import server_down
from .node import Node
from .things import Thing
from .world import Section

if TYPE_CHECKING:
    from .world import World


def _kill(process: Process | None, how: str = "SIGKILL") -> None:
    if process is not None:
        process.die(how)


# --- processes


def node_killed(world: World) -> Undo:
    """SIGKILL of a node. Where nothing else is wrong its session must be over at once (G4)."""
    node = victim(world).node
    if node is None or not node.alive:
        return nothing
    keeper, since = node.keeper, world.disturbances
    calm = (
        world.faults_active == 1
        and node.established
        and keeper is not None
        and keeper.alive
        and not keeper.away.keeps
        and not keeper.stopped
        and not keeper.ending
        and world.nats.connected(keeper)
    )
    node.die("SIGKILL")
    if calm:
        world.after(0.8, _must_be_over, world, node, since)
    return nothing


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
    return nothing


def both_killed(world: World) -> Undo:
    """SIGKILL of both at once."""
    host = victim(world)
    _kill_both(host)
    return nothing


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


def stays_down(host: Host) -> Undo:
    """The node is not started again before this is undone."""
    host.held += 1

    def undo() -> None:
        host.held = max(0, host.held - 1)
        if host.node is None or not host.node.alive:
            host.start_soon()

    return undo


def all_killed(world: World) -> Undo:
    """SIGKILL of node, keeper and warden at once; nobody starts the node again. What ran runs on."""
    host = victim(world)
    undo = stays_down(host)
    if host.keeper is not None:
        _kill(host.keeper.warden)
    _kill(host.keeper)
    _kill(host.node)
    return undo


def started_twice(world: World) -> Undo:
    """Somebody starts the node although it runs: the lock of its data directory refuses that."""
    host = victim(world)
    if host.node is not None and host.node.alive:
        if world.rules.broken == "two-lives-take-up":
            host.begin_life()
        else:
            world.count("second lives refused")
    return nothing


def node_away(world: World) -> Undo:
    """The node ends or is killed, in a pause or not, and is started again only later."""
    host = victim(world)
    undo = stays_down(host)
    if host.node is not None and world.rng.random() < 0.5:
        host.node.run(host.node.terminate)
    else:
        _kill(host.node)
    return undo


def warden_killed(world: World) -> Undo:
    """SIGKILL of a warden; half of the time of node and keeper too, before there is another one."""
    host = victim(world)
    if host.keeper is not None:
        _kill(host.keeper.warden)
    if world.rng.random() < 0.5:
        world.after(world.rng.choice((0.0, 0.5)), _kill_both, host)
    return nothing


def host_died(world: World) -> Undo:
    """Power loss of a machine, with its NATS server if it has one."""
    host = victim(world)
    host.up = False
    host.power_off()
    if host.keeper is not None:
        _kill(host.keeper.warden, "host")
    _kill(host.keeper, "host")
    _kill(host.node, "host")
    back = server_down(world, host.index, lose=world.rng.random() < 0.5) if host.index < 3 else nothing

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
        return nothing
    node.blocked = True
    return lambda: node.unblock() if node.alive else None


def slow_end(world: World) -> Undo:
    """The hooks of the present node take long to end."""
    node = victim(world).node
    if node is not None:
        node.app.end_takes = world.rng.choice((0.3, 0.6, 3.0))
    return nothing


def section_fails(world: World) -> Undo:
    """A program or a check of the active section fails."""
    if world.active:
        node = world.active[-1].node
        node.run(node.app.fail)
    return nothing


def app_paused(world: World) -> Undo:
    """An operator pauses the app, and resumes it."""
    nats, over = world.nats, False
    if nats.bucket.pause[1]:
        return nothing
    nats.operator(lambda: nats.set_pause(True), lambda: not over)

    def undo() -> None:
        nonlocal over
        over = True
        if not nats.bucket.pause[1]:
            return
        if not world.active:
            world.count("pauses that ended while nobody was active")
        nats.operator(lambda: nats.set_pause(False))
        for host in world.hosts:
            keeper = host.keeper
            if keeper is not None and keeper.is_alone and nats.connected(keeper):
                world.after(1.5, _must_not_go_on, world, keeper, world.disturbances)
        ready = any(h.node.settled_since() > 2.5 and not h.no_failover for h in world.hosts if h.node)
        calm = world.faults_active == 1 and world.calm_for > 3.0 and world.now >= nats.bucket.ready_at + 1.5
        if calm and ready:
            world.after(2.5, _must_be_led, world, world.disturbances, world.last_epoch)

    return undo


def _must_not_go_on(world: World, keeper: Keeper, since: int) -> None:
    if world.disturbances == since and not world.nats.bucket.pause[1]:
        if keeper.is_alone and world.now >= world.nats.bucket.ready_at + 1.5 and world.calm_for > 1.0:
            world.fail("pause", f"{keeper.name} goes on alone 1.5 s after the pause is over")
        world.count("ends of a pause checked that a keeper was alone in")


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
    return nothing


def _ask_to_step_down(world: World) -> None:
    stepdown(world)


def stepdown(world: World) -> Undo:
    """An operator hands the app over."""
    if world.active:
        node = world.active[-1].node
        _expect_hand_over(world, node)
        node.run(node.app.hand_over)
    return nothing


def _expect_hand_over(world: World, node: Node) -> None:
    """G10: with nothing else wrong, a named successor is active soon after the old section's end."""
    nats, section = world.nats, node.app.section
    others = [h.node for h in world.hosts if h.node is not None and h.node is not node]
    calm = (
        world.faults_active == 1
        and world.calm_for > 2.6  # sessions are fresh again, and no watch still lags
        and world.now >= nats.bucket.ready_at + 1.5
        and section is not None
        and section.state == "active"
        and node.may_work
        and not node.blocked
        and len(others) == len(world.hosts) - 1 > 0
        and all(n.settled_since() > 2.5 for n in (node, *others))
        and node.app.end_takes < 0.5
        and not nats.bucket.pause[1]
    )
    if calm and section is not None:
        world.after(
            (node.app.end_takes + section.stop_takes) / 0.95 + 0.4,
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
    return nothing


def fence_command_fails(world: World) -> Undo:
    """Everybody's fence command fails, or hangs."""
    world.fence_problem = world.rng.choice(("fails", "hangs"))

    def undo() -> None:
        world.fence_problem = ""

    return undo


def host_said_to_be_off(world: World) -> Undo:
    """For as long as this lasts, an operator says of each host that runs nothing any more that it is off."""
    over = False

    def look() -> None:
        if over:
            return
        nats, present = world.nats, {t.host for host in world.hosts for t in host.things if t.present}
        for host in world.hosts:
            session = nats.bucket.living.get(host.name)
            processes = (host.node, host.keeper, host.keeper.warden if host.keeper is not None else None)
            silent = host not in present and not any(p is not None and p.alive for p in processes)
            if session in world.over_at and silent:
                nats.operator(lambda s=session: nats.note_fenced(FenceNote(s, "operator", world.now)))
        world.after(0.3, look)

    def undo() -> None:
        nonlocal over
        over = True

    look()
    return undo


def connection_kicked(world: World) -> Undo:
    """A connection to NATS is cut; it comes back by itself."""
    host = victim(world)
    process: Process | None = world.rng.choice((host.node, host.keeper))
    if process is not None and process.alive:
        process.run(process.disconnect)
    return nothing
