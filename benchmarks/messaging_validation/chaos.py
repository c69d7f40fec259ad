"""The nodes, NATS servers and clients of a run, and what is done to them, drawn from a seed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.messaging_validation.program import APP, PLATFORM
from phalanx import NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.errors import PhalanxError
from phalanx.testing.history import History
from phalanx.testing.nats import NatsCluster
from phalanx.testing.nodes import Nodes

Say = Callable[[str], None]

PROGRAM = (sys.executable, "-m", "benchmarks.messaging_validation.program")
CLIENT = (sys.executable, "-m", "benchmarks.messaging_validation.client")
ROOT = Path(__file__).parents[2]

FAULTS = (
    "leader",
    "leader",
    "hand-over",
    "hand-over",
    "node",
    "node and keeper",
    "leader and keeper",
    "nats-server",
    "client",
)
"""Each as often as the others; those that are there twice twice as often."""


class Stage:
    """``async with``: three NATS servers, three nodes, two clients; all of them write into one history."""

    def __init__(self, folder: Path, ttl: float, clients: int = 2) -> None:
        self.folder, self.nats = folder, NatsCluster(3)
        self.history = History(folder / "history")
        self._ttl, self._count = ttl, clients
        self.nodes: Nodes
        self.clients: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> Stage:
        try:
            self.nats.start()
            await self.nats.ready()
            self.nodes = Nodes(PROGRAM, env_of=self._environment)
            self.nodes.start()
            await self.nodes.wait_for_active(APP, timeout=60)
            await self.nodes.wait_for_standbys(APP, 2, timeout=60)
            for number in range(self._count):
                self.start_client(f"c{number + 1}")
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _environment(self, i: int) -> dict[str, str]:
        urls = [self.nats.url((i + j) % self.nats.size) for j in range(self.nats.size)]
        given = {"history": str(self.history.path), "urls": urls, "ttl": self._ttl}
        path = f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        return {"PHALANX_TEST": json.dumps(given), "PYTHONPATH": path}

    def start_client(self, name: str) -> None:
        """A client; one that has died is followed by another of that name."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.clients[name] = subprocess.Popen(
                [*CLIENT, name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment(int(name[1:]))},
            )

    def kill_client(self, name: str) -> None:
        """SIGKILL."""
        process = self.clients[name]
        process.kill()
        process.wait()

    def client(self) -> PlatformClient:
        """One for the run itself."""
        return PlatformClient(PLATFORM, NatsOptions(urls=tuple(self.nats.urls)), timeout=30)

    async def close(self) -> None:
        """End everything."""
        for name in self.clients:
            self.kill_client(name)
        if hasattr(self, "nodes"):
            for node in self.nodes:
                with contextlib.suppress(OSError):
                    (self.folder / f"{node.node}.log").write_text(node.log())
            await asyncio.to_thread(self.nodes.stop)
        self.nats.stop()
        self.history.close()


class Chaos:
    """Faults for so many seconds; whatever has died is started again a moment later."""

    def __init__(self, stage: Stage, rng: random.Random, say: Say) -> None:
        self._stage, self._rng, self._say = stage, rng, say
        self.inflicted: dict[str, int] = {}
        self._outage: asyncio.Task[None] | None = None
        self._bag: list[str] = []

    async def run(self, seconds: float) -> None:
        """Returns when all is running again."""
        end = system.now() + seconds
        reviving = asyncio.create_task(self._revive(), name="revive")
        try:
            while system.now() < end:
                await asyncio.sleep(self._rng.uniform(0.5, 3.0))
                await self._inflict(self._drawn())
        finally:
            reviving.cancel()
            await asyncio.gather(reviving, return_exceptions=True)
            if self._outage is not None:
                await self._outage
        self._say("no more faults; everything is brought back")
        self._start_dead()

    def _drawn(self) -> str:
        if not self._bag:
            self._bag = list(FAULTS)
            self._rng.shuffle(self._bag)
        return self._bag.pop()

    def _start_dead(self) -> None:
        for node in self._stage.nodes:
            if not node.is_running:
                node.start()
        for name, process in list(self._stage.clients.items()):
            if process.poll() is not None:
                self._stage.start_client(name)

    async def _revive(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 2.5))
            self._start_dead()

    async def _inflict(self, kind: str) -> None:
        leaders = await asyncio.to_thread(self._stage.nodes.actives, APP)
        running = [node.node for node in self._stage.nodes if node.is_running]
        at_leader = kind in ("leader", "leader and keeper", "hand-over")
        node = leaders[0] if leaders and at_leader else self._rng.choice(running or [""])
        if not node or (at_leader and not leaders):
            return
        try:
            done = await self._done(kind, node)
        except (RuntimeError, OSError, PhalanxError, TimeoutError) as error:
            self._say(f"  {kind} {node}: came to nothing ({str(error).partition(chr(10))[0]})")
            return
        if done:
            self._say(done)
            self.inflicted[kind] = self.inflicted.get(kind, 0) + 1

    async def _done(self, kind: str, node: str) -> str:
        stage = self._stage
        match kind:
            case "leader" | "node":
                await asyncio.to_thread(stage.nodes[node].kill)
            case "leader and keeper" | "node and keeper":
                await asyncio.to_thread(stage.nodes[node].kill_both)
            case "hand-over":
                async with asyncio.timeout(20), stage.client() as client:
                    handed = await client.step_down(APP, reason="validation", timeout=15)
                return f"{kind}: from {node} to {handed.active}"
            case "client":
                name = self._rng.choice(sorted(stage.clients))
                stage.kill_client(name)
                return f"SIGKILL client {name}"
            case _:
                if self._outage is not None and not self._outage.done():
                    return ""
                number, seconds = self._rng.randrange(stage.nats.size), self._rng.uniform(0.5, 4.0)
                self._outage = asyncio.create_task(self._away(number, seconds), name="outage")
                return f"SIGKILL nats-server {number + 1}, for {seconds:.1f} s"
        return f"SIGKILL {kind}: {node}"

    async def _away(self, number: int, seconds: float) -> None:
        """Never two at a time: then nothing is promised but no harm."""
        await asyncio.to_thread(self._stage.nats.kill, number)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self._stage.nats.start, number)
        await self._stage.nats.ready(60)


__all__ = ["Chaos", "Stage"]
