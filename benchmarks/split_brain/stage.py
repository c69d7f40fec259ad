"""Five hosts: NATS servers on three of them, a node on each, clients on some; and who may count on what."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from benchmarks.split_brain import client, node
from benchmarks.split_brain.node import APP
from phalanx import system
from phalanx.testing.history import Event, Follower, History
from phalanx.testing.nats import NatsCluster
from phalanx.testing.netlab import Host, NetLab
from phalanx.testing.nodes import NodeProcess, Nodes

HOSTS, SERVERS = 5, 3
CLIENT_HOSTS = (0, 2, 4)
"""Two beside a NATS server, one without."""

SERVICE_NUMBER = 100
READY_SECONDS = 60.0


class Stage:
    """``async with Stage(…)``: everything runs, and every client has been answered.

    *vip*: reach the program by a virtual address; without it clients look for it on every host.
    """

    def __init__(self, ttl: float, *, vip: bool) -> None:
        self.ttl = ttl
        self.folder = Path(tempfile.mkdtemp(prefix="phalanx-split-brain-"))
        self.history = History(self.folder / "history")
        self._follower = Follower(self.history.path)
        self.lab = NetLab(HOSTS)
        self.service = self.lab.address(SERVICE_NUMBER) if vip else ""
        self.clients: dict[int, subprocess.Popen[bytes]] = {}
        self.frozen_servers: set[int] = set()
        self.nats: NatsCluster
        self.nodes: Nodes

    # --- life

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.lab.start)
        try:
            self.nats = NatsCluster(hosts=self.lab.hosts[:SERVERS])
            self.nats.start()
            await self.nats.ready()
            command = (sys.executable, "-m", node.__name__)
            self.nodes = Nodes(command, count=HOSTS, hosts=self.lab.hosts, env_of=self._environment)
            self.nodes.start()
            for index in CLIENT_HOSTS:
                self._start_client(index)
            await self.served(system.now())
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything; the folder stays, with all logs."""
        self.lab.heal()
        self.stop_clients()
        if hasattr(self, "nodes"):
            for each in self.nodes:
                (self.folder / f"{each.node}.log").write_text(each.log())
            self.nodes.stop()
        if hasattr(self, "nats"):
            for i in range(SERVERS):
                (self.folder / f"nats-{self.nats.name(i)}.log").write_text(self.nats.log(i))
            self.nats.stop()
        self.lab.close()
        self._follower.close()
        self.history.close()

    def _environment(self, i: int) -> dict[str, str]:
        own = i % SERVERS
        settings = node.Settings(
            urls=tuple(self.nats.url((own + n) % SERVERS) for n in range(SERVERS)),
            server_name=self.nats.name(i) if i < SERVERS else "",
            folder=str(self.folder / f"n{i + 1}"),
            vip=f"{self.service}/24" if self.service else "",
            ttl=self.ttl,
        )
        return {"LAB_NODE": msgspec.json.encode(settings).decode()}

    def _start_client(self, index: int) -> None:
        host = self.lab[index]
        settings = client.Settings(
            name=f"c{index + 1}",
            history=str(self.history.path),
            service=self.service,
            hosts=tuple(each.address for each in self.lab),
        )
        command = (sys.executable, "-m", client.__name__, msgspec.json.encode(settings).decode())
        with open(self.folder / f"{settings.name}.log", "ab") as log:
            self.clients[index] = host.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop_clients(self) -> None:
        """Nobody asks or writes any more."""
        for process in self.clients.values():
            process.kill()
            process.wait(10)

    # --- what has happened

    def read(self) -> list[Event]:
        """What was recorded since the last call."""
        return self._follower.read()

    async def served(self, since: float) -> None:
        """Wait until every client has a confirmed write that it began after *since*. Raises TimeoutError."""
        missing = {f"c{index + 1}" for index in CLIENT_HOSTS}
        deadline = system.now() + READY_SECONDS
        while missing:
            for event in self.read():
                if event.data.get("confirmed") and event.data["sent"] >= since:
                    missing.discard(event.data["client"])
            if system.now() > deadline:
                raise TimeoutError(
                    f"no write of {', '.join(sorted(missing))} was confirmed for {READY_SECONDS:g} s"
                )
            await asyncio.sleep(0.05)

    async def whole(self) -> None:
        """Wait until one node is active and all others are standbys. Raises TimeoutError."""
        await self.nodes.wait_for_active(APP, timeout=READY_SECONDS)
        await self.nodes.wait_for_standbys(APP, HOSTS - 1, timeout=READY_SECONDS)

    def stored(self, active: str) -> dict[str, int]:
        """Id → number of every row in the database of the active node."""
        path = self.folder / active / "wiki.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
            return dict(connection.execute("SELECT id, number FROM entries").fetchall())

    # --- who is where

    def node(self, index: int) -> NodeProcess:
        """The node on host *index*."""
        return self.nodes[f"n{index + 1}"]

    def program_pids(self, index: int) -> list[int]:
        """The processes of the program on host *index*."""
        return [pid for pid in self.lab[index].pids() if _is_program(pid)]

    def pids(self, index: int) -> list[int]:
        """Every process of host *index* but its client and its NATS server."""
        others = {self.clients[index].pid} if index in self.clients else set[int]()
        if index < SERVERS and self.nats.is_running(index):
            others.add(self.nats.pid(index))
        return [pid for pid in self.lab[index].pids() if pid not in others]

    def majority(self) -> list[int]:
        """The hosts where the service must be reached, but for the time of a failover.

        Those that see a majority of NATS servers that see each other, and see each other *all*: the active
        node may be on any of those that see NATS, so one that does not see some of them may miss it.
        """
        up = [i for i in range(SERVERS) if self.nats.is_running(i) and i not in self.frozen_servers]
        pairs = [(a, b) for a, b in itertools.combinations(up, 2) if self._routed(a, b)]
        seeing = [h for h in range(HOSTS) if any(self._sees(h, a) and self._sees(h, b) for a, b in pairs)]
        return [h for h in seeing if all(self.lab.connected(h, other) for other in seeing)]

    def _routed(self, one: int, other: int) -> bool:
        return self.lab.connected(one, other, self.nats.route_port(other)) and self.lab.connected(
            other, one, self.nats.route_port(one)
        )

    def _sees(self, host: int, server: int) -> bool:
        return self.lab.connected(host, server, self.nats.port(server))


def send(pids: list[int], number: signal.Signals) -> None:
    """A signal to several processes; those that are gone are fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_program(pid: int) -> bool:
    try:
        return str(node.PROGRAM).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


__all__ = ["CLIENT_HOSTS", "HOSTS", "SERVERS", "Host", "Stage", "send"]
