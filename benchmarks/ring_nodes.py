"""Rings of real processes: how soon all is owned again, and who answers for what it does not own."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from benchmarks.figures import Run
from phalanx import Key, NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.errors import CallError
from phalanx.testing.history import Event, Follower, History
from phalanx.testing.nats import NatsCluster
from phalanx.testing.nodes import Nodes
from phalanx.testing.ring_program import RING, RING_PROGRAM, Answer, RingSettings, ring_violations

LOOK_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
CALLERS = 16


class RingStage:
    """``async with RingStage(…)``: nodes of a ring on three nats-servers, and the history that they write."""

    def __init__(self, *, count: int, ttl: float, partitions: int, names: int = 3) -> None:
        self.nats = NatsCluster(names)
        self.partitions = partitions
        self._directory = tempfile.TemporaryDirectory(prefix="phalanx-ring-")
        self.history = History(Path(self._directory.name) / "history")
        settings = RingSettings(history=str(self.history.path), ttl=ttl, partitions=partitions)
        env = {"PHALANX_TEST": msgspec.json.encode(settings).decode()}
        self._env, self._count = env, count
        self._follower = Follower(self.history.path)
        self.events: list[Event] = []
        self.owners: dict[int, Event] = {}
        """Who has begun with each partition last, by ``owned``."""
        self.nodes: Nodes

    async def __aenter__(self) -> Self:
        self.nats.__enter__()
        self.nodes = Nodes(RING_PROGRAM, self.nats.urls, count=self._count, env=self._env)
        self.nodes.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nodes.stop()
        self.nats.__exit__(kind, error, trace)
        self._follower.close()
        self.history.close()
        self._directory.cleanup()

    def look(self) -> None:
        """Read what was written since."""
        for event in self._follower.read():
            self.events.append(event)
            if event.kind == "owned":
                self.owners[int(event.data["partition"])] = event

    async def settled(self, running: set[str]) -> None:
        """Wait until all partitions are owned by *running*, each with its share. Raises TimeoutError."""
        low, high = self.partitions // len(running), -(-self.partitions // len(running))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                self.look()
                counts = dict.fromkeys(running, 0)
                for event in self.owners.values():
                    counts[event.node] = counts.get(event.node, 0) + 1
                balanced = counts.keys() == running and all(low <= n <= high for n in counts.values())
                if balanced and sum(counts.values()) == self.partitions:
                    return
                await asyncio.sleep(LOOK_SECONDS)

    async def owned_again(self, by: set[str], since: float) -> float:
        """Wait until *by* own all that others had; the moment when the last of them was owned."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                self.look()
                if all(event.node in by for event in self.owners.values()):
                    return max((e.at for e in self.owners.values() if e.at >= since), default=since)
                await asyncio.sleep(LOOK_SECONDS)


async def rebalance(run: Run) -> None:
    """SIGKILL of one of three nodes with 256 partitions → the last of its partitions owned again, in ms."""
    async with RingStage(count=3, ttl=5.0, partitions=256) as stage:
        names = {node.node for node in stage.nodes}
        for number in range(run.runs):
            await stage.settled(names)
            await asyncio.sleep(0.5)
            victim = f"n{number % 3 + 1}"
            had = sum(1 for event in stage.owners.values() if event.node == victim)
            began = system.now()
            stage.nodes[victim].kill()
            owned = await stage.owned_again(names - {victim}, began)
            took = 1000 * (owned - began)
            run.add(took, f"{took:.0f} ms, {had} partitions of {victim}")
            stage.nodes[victim].start()
        run.problems += ring_violations(sorted(stage.events, key=lambda event: event.at))[:5]


async def single_owner(run: Run) -> None:
    """Keys answered by a non-owner: nodes are killed, stopped, frozen and started under load."""
    chance = random.Random(run.runs)
    async with RingStage(count=4, ttl=2.0, partitions=64) as stage:
        every = {node.node for node in stage.nodes}
        running = set(every)
        await stage.settled(running)
        client = PlatformClient("test", NatsOptions(urls=tuple(stage.nats.urls)))
        async with client:
            load = _Load(client)
            calling = [asyncio.create_task(load.run(chance.random())) for _ in range(CALLERS)]
            try:
                for _ in range(run.runs):
                    answered, broken = load.answers, len(load.problems)
                    what = await _change(stage, chance, every, running)
                    await stage.settled(running)
                    await load.wait_for(load.answers + CALLERS)
                    found = len(load.problems) - broken
                    run.add(found, f"{what}; {load.answers - answered} calls answered")
            finally:
                for task in calling:
                    task.cancel()
                await asyncio.gather(*calling, return_exceptions=True)
        stage.look()
        found = ring_violations(sorted(stage.events, key=lambda event: event.at))
        run.problems += found[:5] + load.problems[:5]
        run.say(f"{load.answers} answers, {load.failed} calls failed, {len(stage.events)} events checked")


async def _change(stage: RingStage, chance: random.Random, every: set[str], running: set[str]) -> str:
    """One change of membership. Two nodes run at least."""
    absent = sorted(every - running)
    if absent and (len(running) <= 2 or chance.random() < 0.5):
        node = chance.choice(absent)
        stage.nodes[node].start()
        running.add(node)
        return f"{node} starts"
    node = chance.choice(sorted(running))
    running.discard(node)
    how = chance.choice(("kill", "stop", "freeze"))
    process = stage.nodes[node]
    if how == "kill":
        process.kill()
    elif how == "stop":
        process.terminate()
        await asyncio.to_thread(process.wait, PATIENCE_SECONDS)
    else:
        process.freeze()
        await asyncio.to_thread(process.wait, PATIENCE_SECONDS)  # its keeper kills it
    return f"{node}: {how}"


class _Load:
    """Callers that look at the answers themselves: the epoch of a partition never goes back."""

    def __init__(self, client: PlatformClient) -> None:
        self._api = client.api(RING)
        self.answers = self.failed = 0
        self.problems: list[str] = []
        self._newest: dict[int, tuple[int, float]] = {}

    async def run(self, seed: float) -> None:
        """Call until cancelled."""
        chance = random.Random(seed)
        while True:
            key, began = f"key-{chance.randrange(10_000)}", system.now()
            try:
                answer = await self._api.call("get", key, returns=Answer, to=Key(key), timeout=30)
            except CallError as error:
                self.failed += 1
                self.problems.append(f"a call failed: {error}")
                continue
            self._judge(answer, began)
            await asyncio.sleep(0.01)

    def _judge(self, answer: Answer, began: float) -> None:
        self.answers += 1
        epoch, at = self._newest.get(answer.partition, (0, 0.0))
        if answer.epoch < epoch and began > at:
            self.problems.append(f"partition {answer.partition}: epoch {answer.epoch} after {epoch}")
        if answer.epoch > epoch:
            self._newest[answer.partition] = (answer.epoch, system.now())

    async def wait_for(self, answers: int) -> None:
        """Wait for so many answers in all. Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.answers < answers:  # noqa: ASYNC110 - callers count, they wake nobody
                await asyncio.sleep(LOOK_SECONDS)


__all__ = ["rebalance", "single_owner"]
