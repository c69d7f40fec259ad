"""Kills of whatever has to do with a database, drawn from a seed, while it is written and read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.stage import APP, Stage
from phalanx import system
from phalanx.errors import BusError

Fault = Callable[["Chaos", str], Coroutine[Any, Any, None]]
Say = Callable[[str], None]

FAILOVER_SECONDS = 40.0
"""How long nobody may commit after a failover; a NATS server may be down at the same time."""

LOOK_SECONDS = 0.02


class Inflicted(msgspec.Struct, frozen=True):
    """One fault. ``epoch``: who wrote when it struck, 0 if it did not strike the writer."""

    kind: str
    node: str
    at: float
    epoch: int = 0


class Chaos:
    """Inflicts faults on the nodes of *stage*; those that have died are started again after a while."""

    def __init__(self, stage: Stage, rng: random.Random, say: Say) -> None:
        assert stage.nats is not None
        self.stage, self.nats, self._rng, self.say = stage, stage.nats, rng, say
        self.inflicted: list[Inflicted] = []
        self.problems: list[str] = []
        self.failovers = 0
        """Kills of the writer after which another reign has committed something."""
        self._writer, self._epoch, self._wrote_at = "", 0, 0.0
        self._nats_is_down = False
        self.outages: list[asyncio.Task[None]] = []
        """Of servers that are away for longer than the fault takes that killed them."""
        self._down: dict[str, float] = {}
        """Dead nodes, and when each is started again."""
        self._bag: list[str] = []

    async def run(self, failovers: int, seconds: float) -> None:
        """Faults until there were that many *failovers*, at most for *seconds*; then all is undone."""
        end = system.now() + seconds
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(self._revive(), name="revive nodes"),
                tasks.create_task(self._watch(), name="watch the writer"),
            ]
            async with asyncio.TaskGroup() as faults:
                while self.failovers < failovers and system.now() < end:
                    await self._one_more(faults)
            self.say("no more faults; everything is brought back")
            await asyncio.gather(*self.outages)
            self.nats.start()
            for task in beside:
                task.cancel()
        for node in self.stage.nodes:
            if not node.is_running:
                node.start()
        if self.failovers < failovers:
            self.problems.append(f"only {self.failovers} of {failovers} failovers within {seconds:g} s")

    async def _one_more(self, tasks: asyncio.TaskGroup) -> None:
        """Something beside now and then, and a kill of the writer at some moment."""
        if self._rng.random() < 0.7:
            tasks.create_task(self._later(self._drawn(BESIDE), self._rng.uniform(0.0, 4.0)), name="fault")
        await asyncio.sleep(self._rng.uniform(0.1, 4.0))
        await self._wait_for_writer(1)
        before = self._epoch
        await self._inflict(self._drawn(FAILOVERS))
        if self._rng.random() < 0.2:  # whoever is about to take over
            await asyncio.sleep(self._rng.uniform(0.0, 0.6))
            await self._inflict("node", self._rng.choice([node.node for node in self.stage.nodes]))
        if await self._wait_for_writer(before + 1):
            self.failovers += 1

    def _drawn(self, faults: dict[str, Fault]) -> str:
        """Each kind comes as often as the others."""
        fit = [kind for kind in self._bag if kind in faults]
        if not fit:
            fit = list(faults)
            self._rng.shuffle(fit)
            self._bag += fit
        self._bag.remove(fit[0])
        return fit[0]

    async def _later(self, kind: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._inflict(kind)

    async def _inflict(self, kind: str, node: str = "") -> None:
        """*node*: the writer, unless it is said."""
        at_writer = not node and kind in (*FAILOVERS, *AT_WRITER)
        node = node or (self._writer if at_writer else self._some_follower())
        if not node or (not self.stage.nodes[node].is_running and kind != "nats"):
            return
        epoch = self._epoch if node == self._writer else 0
        try:
            await {**FAILOVERS, **BESIDE}[kind](self, node)
        except (RuntimeError, OSError) as error:
            self.say(f"  {kind} {node}: came too late ({error})")
            return
        self.inflicted.append(Inflicted(kind, node, system.now(), epoch))

    def _some_follower(self) -> str:
        running = [n.node for n in self.stage.nodes if n.is_running and n.node != self._writer]
        return self._rng.choice(running) if running else ""

    # --- what goes on meanwhile

    async def _wait_for_writer(self, epoch: int) -> bool:
        """Wait until somebody commits under *epoch* or a later one; a problem if nobody does."""
        began = system.now()
        while self._epoch < epoch or self._wrote_at < system.now() - 0.5:
            if system.now() > began + FAILOVER_SECONDS:
                self.problems.append(
                    f"nobody committed anything under epoch {epoch} or later in {FAILOVER_SECONDS:g} s "
                    f"(the last was {self._writer}, epoch {self._epoch})"
                )
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    async def _watch(self) -> None:
        while True:
            for event in self.stage.read():
                if event.kind == "opened":
                    self.say(
                        f"    {event.node} writes, epoch {event.epoch}, after row {event.data['number']}"
                    )
                if event.kind == "committed" and event.epoch >= self._epoch:
                    self._writer, self._epoch, self._wrote_at = event.node, event.epoch, event.at
            await asyncio.sleep(LOOK_SECONDS)

    async def _revive(self) -> None:
        while True:
            for node in self.stage.nodes:
                if node.is_running:
                    self._down.pop(node.node, None)
                elif node.node not in self._down:
                    self._down[node.node] = system.now() + self._rng.uniform(0.2, 3.0)
                elif system.now() > self._down[node.node]:
                    self.say(f"  {node.node} is started again")
                    node.start()
            await asyncio.sleep(LOOK_SECONDS)

    def some(self, least: float, most: float) -> float:
        """A random number of seconds."""
        return self._rng.uniform(least, most)

    # --- processes

    def processes(self, node: str, word: bytes = b"") -> list[int]:
        """Those that *node* has started, directly or not, with *word* in their command line."""
        return [pid for pid in descendants(self.stage.nodes[node].pid) if word in command_line(pid)]

    async def log_leader(self) -> int | None:
        """The number of the server that leads the log; None while that is not known."""
        with contextlib.suppress(BusError):
            stream = self.stage.names.wal_stream(APP)
            info = await self.stage.bus.api(f"STREAM.INFO.{stream}", {}, timeout=2)
            cluster: dict[str, Any] = info.get("cluster") or {}
            leader = cluster.get("leader")
            return next((i for i in range(self.nats.size) if self.nats.name(i) == leader), None)
        return None

    async def kill_server(self, i: int | None = None) -> None:
        """One of the NATS servers is away for a while. Never two: then nothing is promised but no harm."""
        if self._nats_is_down:
            return
        self._nats_is_down = True
        i, seconds = self._rng.randrange(self.nats.size) if i is None else i, self._rng.uniform(0.5, 6.0)
        self.say(f"SIGKILL nats-server {self.nats.name(i)}, for {seconds:.1f} s")
        self.nats.kill(i)
        await asyncio.sleep(seconds)
        self.nats.start(i)
        self.say(f"nats-server {self.nats.name(i)} is started again")
        await self.nats.ready(60)
        self._nats_is_down = False


def descendants(pid: int) -> Iterator[int]:
    """The processes that *pid* has started, and theirs."""
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                yield int(child)
                yield from descendants(int(child))


def command_line(pid: int) -> bytes:
    """Of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_at_once(pids: list[int]) -> None:
    """SIGKILL all, none of which can still act on the end of another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


# --- faults


async def _kill_node(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL {node}")
    chaos.stage.nodes[node].kill()


async def _kill_both(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL {node} and its keeper")
    chaos.stage.nodes[node].kill_both()


async def _kill_everything(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL {node}, its keeper, its Litestream and its replica process")
    process = chaos.stage.nodes[node]
    kill_at_once([process.keeper_pid, process.pid, *chaos.processes(node)])
    process.wait(10)


async def _kill_all_nodes(chaos: Chaos, node: str) -> None:
    chaos.say("SIGKILL all nodes with all that they have started")
    running = [process for process in chaos.stage.nodes if process.is_running]
    kill_at_once([pid for process in running for pid in (process.pid, *chaos.processes(process.node))])
    for process in running:
        process.wait(10)


async def _kill_log_leader_first(chaos: Chaos, node: str) -> None:
    """Nothing is shipped while the log has no leader: what was committed then is lost with the writer."""
    outage = asyncio.create_task(chaos.kill_server(await chaos.log_leader()), name="nats")
    chaos.outages.append(outage)
    await asyncio.sleep(chaos.some(0.2, 1.5))
    await _kill_everything(chaos, node)


async def _kill_litestream(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL Litestream of {node}")
    kill_at_once(chaos.processes(node, b"litestream"))


async def _kill_replica(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGKILL the replica process of {node}")
    kill_at_once(chaos.processes(node, b"phalanx.data.replica_process"))


async def _step_down(chaos: Chaos, node: str) -> None:
    chaos.say(f"{node} is asked to step down")
    with contextlib.suppress(BusError):
        reply = await chaos.stage.step_down(APP)
        chaos.say(f"  {reply.node} has stepped down for {reply.successor}{reply.error and ': '}{reply.error}")


async def _terminate(chaos: Chaos, node: str) -> None:
    chaos.say(f"SIGTERM {node}")
    process = chaos.stage.nodes[node]
    process.terminate()
    if not await _ended(process.pid, 20):
        chaos.problems.append(f"{node} has not ended 20 s after SIGTERM")
        process.kill()


async def _ended(pid: int, seconds: float) -> bool:
    deadline = system.now() + seconds
    while command_line(pid):
        if system.now() > deadline:
            return False
        await asyncio.sleep(LOOK_SECONDS)
    return True


async def _kill_server(chaos: Chaos, node: str) -> None:
    await chaos.kill_server()


FAILOVERS: dict[str, Fault] = {
    "node": _kill_node,
    "node + keeper": _kill_both,
    "everything": _kill_everything,
    "all nodes": _kill_all_nodes,
    "log's leader, then everything": _kill_log_leader_first,
}
"""What ends the writer's reign at once."""

BESIDE: dict[str, Fault] = {
    "litestream": _kill_litestream,
    "stepdown": _step_down,
    "terminate": _terminate,
    "follower": _kill_node,
    "replica process": _kill_replica,
    "nats": _kill_server,
}
"""What happens besides, to the writer or to a follower."""

AT_WRITER = ("litestream", "stepdown", "terminate")
