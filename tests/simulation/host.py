"""One machine: its clock, and what a process on it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .world import World

if TYPE_CHECKING:
    from phalanx.decide.hold import Member

    from .keeper import Keeper
    from .node import Node
    from .things import Lock, Thing

PIPE = 0.0003
"""Seconds between the two ends of the socket pair."""


class Host:
    """A machine. Its clock runs up to 5 % fast or slow and shows anything."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index, self.name = world, index, f"n{index + 1}"
        self.rate = world.rng.choice((0.95, 1.05, world.rng.uniform(0.95, 1.05)))
        self.offset = world.rng.uniform(0, 1e6)
        self.node: Node | None = None
        self.keeper: Keeper | None = None
        self.priority = world.rng.choice((0, 0, 0, 1, 5))
        self.no_failover = index > 0 and world.rng.random() < 0.2
        """Never of the first one: somebody has to lead when nobody is named."""
        self.has_command = False
        """Whether its node declares a fence command."""
        from .things import Lock

        self.registered: list[Thing] = []
        """What ``registered.json`` names, and what is left of it."""
        self.things: list[Thing] = []
        self.lock: Lock = Lock()
        self.holds = world.holds and (index == 0 or world.rng.random() < 0.85)
        self.member: Member | None = None
        """The memory of a process that only begins another session: what it has promised it knows still."""
        self.lives = 0
        self.up = True
        self.starting = False
        self.noted: Keeper | None = None
        """Whom ``keeper.json`` names: it may outlive its node."""
        self.held = 0
        """By so many the node is kept from being started again."""

    def clock(self) -> float:
        """What CLOCK_BOOTTIME shows."""
        return self.offset + self.rate * self.world.now

    def power_off(self) -> None:
        """Nothing of it runs any more, and the boot id of the file is not that of the next boot."""
        for thing in self.things:
            thing.vanish("power loss")
        self.registered.clear()
        self.noted = None

    def switch_off(self) -> None:
        """By somebody's fence command: nothing of it runs any more. Some time later it is on again."""
        self.up = False
        self.power_off()
        warden = self.keeper.warden if self.keeper is not None else None
        for process in (warden, self.keeper, self.node):
            if process is not None:
                process.die("fenced")
        self.world.after(self.world.rng.uniform(0.5, 3.0), self._switch_on)

    def _switch_on(self) -> None:
        self.up = True
        if self.node is None or not self.node.alive:
            self.start_soon()

    def start_soon(self, longest: float = 0.8) -> None:
        """A supervisor starts the node again, with a new session."""
        if not self.starting:
            self.starting = True
            self.world.after(self.world.rng.uniform(0.1, longest), self._start)

    def _start(self) -> None:
        self.starting = False
        if not self.up or self.held or (self.node is not None and self.node.alive):
            return
        self.begin_life()

    def begin_life(self) -> None:
        """A new process of the node."""
        from .node import Node

        self.lives += 1
        if self.keeper is not None and self.keeper.alive and self.keeper.stopped:
            self.world.count("new life beside a stopped keeper")
        self.node = Node(self)
        self.node.start()


class Process:
    """Something that the kernel runs, stops or kills, with one connection to NATS."""

    kind = "process"

    def __init__(self, host: Host) -> None:
        self.host, self.world = host, host.world
        self.nats = host.world.nats
        self.name = f"{host.name}{'' if self.kind == 'node' else ' keeper'}"
        self.alive, self.stopped = True, False
        self.blocked = False
        self.conn: tuple[int, int] | None = None
        self._queue: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._noticing = False

    # --- running

    def run(self, call: Callable[..., None], *args: Any) -> None:
        """What happens to this process: now, or when it runs again."""
        if not self.alive:
            return
        if self.stopped or self.blocked:
            self._queue.append((call, args))
        else:
            call(*args)

    def timer(self, local_delay: float, call: Callable[..., None], *args: Any) -> None:
        """Call after that much of this machine's time."""
        self.world.after(max(0.0, local_delay) / self.host.rate, self.run, call, *args)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT: all that waited happens, in order."""
        self.stopped = False
        self._flush()

    def _flush(self) -> None:
        while self._queue and self.alive and not self.stopped and not self.blocked:
            call, args = self._queue.pop(0)
            call(*args)

    def die(self, how: str) -> None:
        """SIGKILL, or an exit."""
        if self.alive:
            self.alive = False
            self._queue.clear()
            self.world.log(self.name, f"dies: {how}")
            self.on_death(how)

    def on_death(self, how: str) -> None:
        """What the kernel does then."""

    # --- its connection

    def connect(self) -> None:
        """Try servers until one takes the connection."""
        if self.conn is not None or not self.alive:
            return
        rng, nats = self.world.rng, self.nats
        reachable = [s for s in nats.servers if s.up and nats.link[self.host.index][s.index]]
        if not reachable:
            self.timer(rng.uniform(0.1, 0.4), self.connect)
            return
        server = rng.choice(reachable)
        self.conn = (server.index, server.life)
        self.on_connected()

    def notice_break(self) -> None:
        """The connection broke or stalls: pings or the kernel will say so in a while."""
        if not self._noticing:
            self._noticing = True
            self.world.after(self.world.rng.uniform(0.01, 0.4), self.run, self._break)

    def _break(self) -> None:
        self._noticing = False
        if not self.nats.connected(self):  # a link that came back in time was only slow
            self.disconnect()

    def disconnect(self) -> None:
        """The connection is gone: get another one."""
        if self.conn is not None:
            self.conn = None
            self.on_disconnected()
            self.timer(self.world.rng.uniform(0.02, 0.2), self.connect)

    def on_connected(self) -> None:
        """A connection is there."""

    def on_disconnected(self) -> None:
        """It is gone."""
