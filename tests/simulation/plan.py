"""Which faults one schedule has, and when."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from . import faults, hold_faults, network_faults
from .fault import Undo
from .node import Node

if TYPE_CHECKING:
    from .world import World

FAULTS: dict[Callable[[World], Undo], float] = {
    faults.node_killed: 3,
    faults.keeper_killed: 2,
    faults.both_killed: 3,
    faults.warden_killed: 3,
    faults.all_killed: 2,
    faults.node_away: 1.5,
    faults.started_twice: 0.5,
    faults.host_died: 2,
    faults.node_stopped: 3,
    faults.keeper_stopped: 3,
    faults.both_stopped: 2,
    faults.loop_blocked: 2,
    faults.slow_end: 1.5,
    faults.section_fails: 1.5,
    faults.app_paused: 5,
    faults.nomination: 2.5,
    faults.stepdown: 3,
    faults.sigterm: 2,
    faults.connection_kicked: 2,
    faults.fence_command_fails: 1.5,
    faults.host_said_to_be_off: 1,
    network_faults.server_killed: 3,
    network_faults.server_amnesia: 3,
    network_faults.server_wiped: 1,
    network_faults.all_servers_killed: 0.7,
    network_faults.link_cut: 2,
    network_faults.host_isolated: 4,
    network_faults.host_with_one_server: 2,
    network_faults.server_isolated: 2,
    network_faults.route_cut: 2,
    network_faults.host_slow: 2,
    network_faults.server_slow: 2,
    network_faults.replies_slow_then_isolated: 2.5,
    network_faults.messages_lost: 2,
    network_faults.replies_lost: 2,
    network_faults.refusals: 2,
    network_faults.watch_lags: 2,
    network_faults.watch_drops: 2,
    network_faults.streams_replaced: 2.5,
}
"""Fault → weight."""

PEACEFUL = (faults.node_killed, faults.section_fails, faults.sigterm, faults.connection_kicked)
"""What happens in a pause in which nothing else does."""


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
        if world.adoptable and rng.random() < 0.3:
            self._restarts_in_a_pause(chaos_from, chaos_until)
            return
        if any(host.has_command for host in world.hosts) and rng.random() < 0.1:
            self._leaders_vanish(chaos_from, chaos_until)
            return
        if world.holds and rng.random() < 0.15:
            self._hold_in_peace(chaos_from)
            return
        if world.holds and rng.random() < 0.06:
            world.at(chaos_from + 3.5, self._begin, 0, hold_faults.promises_late)
            return
        table = {**FAULTS, **hold_faults.FAULTS} if world.holds else FAULTS
        kinds, weights = list(table), list(table.values())
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
        world.at(at, self._begin, 0, faults.app_paused)
        fault = rng.choice(PEACEFUL)
        world.at(at + 0.3, self._begin, 1, fault)
        world.at(at + 0.4, self._end, 1, fault.__name__)
        world.at(at + 4.0, self._end, 0, faults.app_paused.__name__)

    def _hold_in_peace(self, chaos_from: float) -> None:
        """NATS is gone for more than three TTLs and all nodes reach each other: the active one goes on. Or
        one of them is not reached: then it does not."""
        world, rng = self.world, self.world.rng
        at, lasts = chaos_from + 4.0, 3.3 * world.timing.ttl
        world.at(at, hold_faults.expect_hold, world, at + lasts)
        world.at(at, self._begin, 0, hold_faults.nats_gone)
        if rng.random() < 0.4:
            world.at(at + rng.uniform(0.0, 2.0), self._begin, 1, hold_faults.peer_isolated)
        world.at(at + lasts + 0.01, self._end, 0, hold_faults.nats_gone.__name__)

    def _restarts_in_a_pause(self, chaos_from: float, chaos_until: float) -> None:
        """The active node ends once or twice; something else may happen meanwhile, and the pause may end."""
        world, rng = self.world, self.world.rng
        at = chaos_from + rng.uniform(0.5, 1.5)
        world.at(at, self._begin, 0, faults.app_paused)
        for number in range(1, rng.choice((2, 3))):
            fault = rng.choice((faults.node_killed, faults.node_away, faults.node_away, faults.started_twice))
            at += rng.uniform(0.3, 1.5)
            world.at(at, self._begin, number, fault)
            world.at(at + rng.choice((0.3, 1.0, 3.5)), self._end, number, fault.__name__)
        if rng.random() < 0.5:
            other = rng.choice((
                faults.keeper_killed, faults.both_killed, faults.all_killed, faults.keeper_stopped,
                network_faults.host_isolated, faults.host_died, faults.section_fails,
            ))  # fmt: skip
            at += rng.uniform(0.1, 1.0)
            world.at(at, self._begin, 9, other)
            world.at(at + rng.uniform(0.3, 3.0), self._end, 9, other.__name__)
        ends = at + rng.uniform(0.3, 3.0)
        if ends < chaos_until:
            world.at(ends, self._end, 0, faults.app_paused.__name__)

    def _leaders_vanish(self, chaos_from: float, chaos_until: float) -> None:
        """One after the other, with what they ran left running; now and then something else with it."""
        world, rng = self.world, self.world.rng
        number, at = 0, rng.uniform(chaos_from, chaos_from + 1.0)
        while at < chaos_until - 0.5:
            fault = rng.choice((faults.all_killed, faults.all_killed, faults.both_stopped, faults.host_died))
            world.at(at, self._begin, number, fault)
            world.at(at + rng.choice((1.0, 2.3, 3.5, 6.0)), self._end, number, fault.__name__)
            if rng.random() < 0.5:
                other = rng.choice((faults.fence_command_fails, faults.host_said_to_be_off))
                world.at(at + rng.uniform(0.0, 2.0), self._begin, number + 1, other)
                world.at(at + rng.uniform(2.0, 3.5), self._end, number + 1, other.__name__)
            number += 2
            at += rng.uniform(1.0, 3.5)

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
        world.fence_problem = ""
        nats.loss = nats.lost_replies = nats.spurious = 0.0
        if world.holds:
            world.peers.heal()
        nats.changed()
        for host in world.hosts:
            host.up, host.held = True, 0
            warden = host.keeper.warden if host.keeper is not None else None
            for process in (warden, host.keeper, host.node):
                if process is not None and process.alive:
                    if isinstance(process, Node):
                        process.watch_lag = process.watch_drop = 0.0
                        process.app.end_takes = 0.05
                        if process.blocked:
                            process.unblock()
                    if process.stopped:
                        process.resume()
            if host.node is None or not host.node.alive:
                host.start_soon()
