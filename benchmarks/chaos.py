"""Random faults on a platform of real processes, drawn from a seed; each is undone after a while."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from benchmarks.checker import WRITE_KEY, Waking
from benchmarks.stage import APP, APP_KEYS, Stage
from phalanx import system
from phalanx.errors import BusError, WrongRevision
from phalanx.names import LEADER_KEY
from phalanx.ports import Fence
from phalanx.testing.faults import TcpProxy, Way

Fault = Callable[["Chaos", str], Coroutine[Any, Any, None]]

RESTART_SECONDS = 0.5
"""A node that has ended is started again after this long, as systemd would."""

MOST_AT_ONCE = 3


class Chaos:
    """Inflicts faults until the time is up. *links*: for each node its proxies to all servers."""

    def __init__(
        self,
        stage: Stage,
        links: dict[str, Sequence[TcpProxy]],
        rng: random.Random,
        ttl: float,
        say: Callable[[str], None],
    ) -> None:
        assert stage.nats is not None
        self.stage, self.nats, self.links, self._rng, self.ttl = stage, stage.nats, links, rng, ttl
        self.say = say
        self.wakings: list[Waking] = []
        self.inflicted: dict[str, int] = {}
        self._busy: set[str] = set()
        """Nodes that a fault is at work on; two on one node would undo each other. ``nats`` is one too."""
        self._active, self._epoch = "", 0
        self.refused = 0
        """Writes under the epoch of a former leader that the server refused, as it has to."""
        self.problems: list[str] = []

    # --- the course of things

    async def run(self, seconds: float) -> None:
        """Faults for that long, then wait for the last of them to be undone."""
        end = system.now() + seconds
        async with asyncio.TaskGroup() as tasks:
            reviving = tasks.create_task(self._revive(), name="revive nodes")
            telling = tasks.create_task(self._tell(), name="tell")
            async with asyncio.TaskGroup() as faults:
                while system.now() < end:
                    self._begin(faults)
                    await asyncio.sleep(self._rng.uniform(0.2, 1.2 * self.ttl))
            self.say("no more faults; everything is brought back")
            for node in self.stage.nodes:
                await self._started(node.node)
            self.nats.start()
            reviving.cancel()
            telling.cancel()

    def _begin(self, tasks: asyncio.TaskGroup) -> None:
        """One random fault, if not too much goes on already."""
        name, fault = self._rng.choice(list(FAULTS.items()))
        node = self._rng.choice([n.node for n in self.stage.nodes])
        # Half of the time at the node where it matters most.
        if self._rng.random() < 0.5 and self._active:
            node = self._active
        where = "nats" if name.startswith("nats") else node
        if where in self._busy or len(self._busy) >= MOST_AT_ONCE:
            return
        self._busy.add(where)
        self.inflicted[name] = self.inflicted.get(name, 0) + 1
        tasks.create_task(self._inflict(name, fault, where, node), name=f"{name} {where}")

    async def _inflict(self, name: str, fault: Fault, where: str, node: str) -> None:
        try:
            await fault(self, node)
        except (RuntimeError, ProcessLookupError, FileNotFoundError) as error:
            self.say(f"  {name} {where}: came too late ({error})")  # it had ended by itself
        finally:
            self._busy.discard(where)

    async def _revive(self) -> None:
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            for node in self.stage.nodes:
                if not node.is_running and node.node not in self._busy:
                    self.say(f"  {node.node} is started again")
                    node.start()

    async def _started(self, node: str) -> None:
        if not self.stage.nodes[node].is_running:
            self.stage.nodes[node].start()

    async def _tell(self) -> None:
        """Follow who is active."""
        while True:
            for event in self.stage.read():
                if event.kind == "active":
                    self.say(f"    {event.node} is active, epoch {event.epoch}")
                    before, self._epoch = self._epoch, event.epoch
                    self._active = event.node
                    if before:
                        await self._write_as_before(before)
            await asyncio.sleep(0.02)

    async def _write_as_before(self, epoch: int) -> None:
        """Write what the former leader could still send: the server must refuse it (G2)."""
        bucket = self.stage.names.app_bucket(APP)
        key = f"{WRITE_KEY}{epoch}.late"
        fence = Fence(self.stage.names.key_subject(bucket, LEADER_KEY), epoch)
        try:
            revision = await self.stage.bus.write(
                self.stage.names.key_subject(bucket, f"{APP_KEYS}{key}"), b"late", fence=fence, timeout=1.0
            )
        except WrongRevision:
            self.refused += 1
        except BusError:
            pass  # no answer. If it was stored, the checker finds it among the stored writes.
        else:
            self.problems.append(
                f"G2: a write under epoch {epoch} was taken at {revision}, after {self._epoch}"
            )

    def name_of(self, node: str) -> str:
        """The node, and whether it is the active one, or was the last."""
        return f"{node} (last active)" if node == self._active else node

    def some(self, least: float, most: float) -> float:
        """A random duration, given in TTLs, in seconds."""
        return self._rng.uniform(least, most) * self.ttl

    def some_servers(self) -> list[int]:
        """Mostly one server, now and then more: then NATS has no majority."""
        count = self._rng.choice((1, 1, 1, 1, 1, 1, 2, 3))
        return self._rng.sample(range(self.nats.size), count)


async def _kill(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL {chaos.name_of(node)}")
    chaos.stage.nodes[node].kill()
    await asyncio.sleep(chaos.some(0, 1))


async def _kill_keeper(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL the keeper of {chaos.name_of(node)}")
    chaos.stage.nodes[node].kill_keeper()


async def _kill_both(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL {chaos.name_of(node)} and its keeper")
    chaos.stage.nodes[node].kill_both()
    await asyncio.sleep(chaos.some(0, 2))


async def _terminate(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGTERM {chaos.name_of(node)}")
    process = chaos.stage.nodes[node]
    process.terminate()
    deadline = system.now() + 15
    while process.is_running:
        if system.now() > deadline:
            chaos.say(f"  {node} has not ended 15 s after SIGTERM: SIGKILL")
            process.kill()
        await asyncio.sleep(0.02)


async def _freeze(chaos: Chaos, node: str) -> None:
    process, seconds = chaos.stage.nodes[node], chaos.some(0.2, 3)
    chaos.say(f"SIGSTOP {chaos.name_of(node)} for {seconds:.1f} s")
    process.freeze()
    await asyncio.sleep(seconds)
    if process.is_running:
        process.thaw()
        chaos.say(f"SIGCONT {node}")


async def _freeze_host(chaos: Chaos, node: str) -> None:
    process, seconds = chaos.stage.nodes[node], chaos.some(0.2, 3)
    chaos.say(f"SIGSTOP {chaos.name_of(node)} and its keeper for {seconds:.1f} s")
    process.freeze(keeper=True)
    await asyncio.sleep(seconds)
    chaos.wakings.append(Waking(node, system.now()))
    process.thaw(keeper=True)
    chaos.say(f"SIGCONT {node} and its keeper")


async def _step_down(chaos: Chaos, node: str) -> None:
    chaos.say("asked the active node to step down")
    with contextlib.suppress(BusError):
        reply = await chaos.stage.step_down(APP)
        chaos.say(f"  {reply.node} has stepped down for {reply.successor}{reply.error and ': '}{reply.error}")


async def _cut_off(chaos: Chaos, node: str) -> None:
    seconds = chaos.some(0.2, 3)
    chaos.say(f"{chaos.name_of(node)} is cut off from NATS for {seconds:.1f} s: nothing arrives")
    for link in chaos.links[node]:
        link.black_hole()
    await _healed(chaos, node, seconds)


async def _deafen(chaos: Chaos, node: str) -> None:
    seconds = chaos.some(0.2, 2)
    chaos.say(f"{chaos.name_of(node)} hears nothing from NATS for {seconds:.1f} s, and is heard")
    for link in chaos.links[node]:
        link.black_hole(Way.DOWN)
    await _healed(chaos, node, seconds)


async def _reset(chaos: Chaos, node: str) -> None:
    seconds = chaos.some(0, 2)
    chaos.say(f"connections of {chaos.name_of(node)} to NATS are reset, for {seconds:.1f} s")
    for link in chaos.links[node]:
        link.cut()
    await _healed(chaos, node, seconds)


async def _delay(chaos: Chaos, node: str) -> None:
    seconds, delay = chaos.some(0.5, 3), chaos.some(0.005, 0.1)
    chaos.say(f"{chaos.name_of(node)} and NATS are {1000 * delay:.0f} ms apart for {seconds:.1f} s")
    for link in chaos.links[node]:
        link.delay(delay)
    await _healed(chaos, node, seconds)


async def _healed(chaos: Chaos, node: str, seconds: float) -> None:
    await asyncio.sleep(seconds)
    for link in chaos.links[node]:
        link.heal()
    chaos.say(f"links of {node} are healed")


async def _kill_servers(chaos: Chaos, node: str) -> None:
    servers, seconds = chaos.some_servers(), chaos.some(0.2, 4)
    names = ", ".join(f"nats-server {chaos.nats.name(i)}" for i in servers)
    chaos.say(f"SIGKILL {names}, for {seconds:.1f} s")
    for i in servers:
        chaos.nats.kill(i)
    await asyncio.sleep(seconds)
    chaos.nats.start()
    chaos.say(f"{names} started again")
    await _servers_ready(chaos)


async def _freeze_servers(chaos: Chaos, node: str) -> None:
    servers, seconds = chaos.some_servers(), chaos.some(0.2, 3)
    names = ", ".join(f"nats-server {chaos.nats.name(i)}" for i in servers)
    chaos.say(f"SIGSTOP {names} for {seconds:.1f} s")
    for i in servers:
        chaos.nats.freeze(i)
    await asyncio.sleep(seconds)
    for i in servers:
        chaos.nats.thaw(i)
    chaos.say(f"SIGCONT {names}")
    await _servers_ready(chaos)


async def _servers_ready(chaos: Chaos) -> None:
    """The next server fault waits until the last one is over: else two would be down by chance."""
    await chaos.nats.ready(60)


FAULTS: dict[str, Fault] = {
    "kill": _kill,
    "kill keeper": _kill_keeper,
    "kill both": _kill_both,
    "terminate": _terminate,
    "freeze": _freeze,
    "freeze host": _freeze_host,
    "step down": _step_down,
    "cut off": _cut_off,
    "deafen": _deafen,
    "reset": _reset,
    "delay": _delay,
    "nats kill": _kill_servers,
    "nats freeze": _freeze_servers,
}
"""Name → fault. Those that start with ``nats`` are at work on servers, the others on a node."""
