"""A platform of real processes to measure: nats-servers, nodes, and the history that they write."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from phalanx import NatsOptions, system
from phalanx.bus.connection import NatsBus
from phalanx.control import StepDownReply
from phalanx.errors import BusError, NatsUnusable
from phalanx.names import Names
from phalanx.testing.history import Event, Follower, History
from phalanx.testing.nats import HOST, NatsCluster, Ports
from phalanx.testing.nodes import PROGRAM, Nodes
from phalanx.testing.program import Settings

PLATFORM = "bench"
APP = "wiki"
APP_KEYS = "kv."
"""What the app's own keys begin with, in its bucket."""

LOOK_SECONDS = 0.01
"""Between looks at the history. It bounds no figure: events are stamped where they happen."""

STEADY_LOOK_SECONDS = 0.1
STEADY_TIMEOUT_SECONDS = 90.0


class Stage:
    """``async with Stage(…)``: nodes of the test program, ready.

    *servers*: how many nats-servers run beside the nodes (or *nats*, which is started here); 0: every node
    has an embedded one, and together they are a cluster. *urls_of*: the URLs for node number i, if they are
    not simply the servers', its own first. *tick_seconds*: between signs of life of active sections.
    Further *settings* are those of the test program.
    """

    def __init__(
        self,
        *,
        ttl: float,
        servers: int = 3,
        nats: NatsCluster | None = None,
        count: int = 3,
        apps: tuple[str, ...] = (APP,),
        tick_seconds: float = 0.05,
        urls_of: Callable[[int], tuple[str, ...]] | None = None,
        **settings: Any,
    ) -> None:
        self.names = Names(PLATFORM)
        self.nats = nats if nats is not None else NatsCluster(servers) if servers else None
        self._ports = Ports()
        self._embedded = [] if self.nats is not None else self._embedded_servers(count)
        self._urls_of = urls_of
        self._directory = Path(tempfile.mkdtemp(prefix="phalanx-bench-"))
        self.history = History(self._directory / "history")
        self._follower = Follower(self.history.path)
        self._settings: dict[str, Any] = {"ttl": ttl, "apps": apps, "tick_seconds": tick_seconds, **settings}
        self.apps = apps
        self.nodes = Nodes(PROGRAM, count=count, env_of=self._environment)
        self.events: list[Event] = []
        """What has happened, as far as it was read."""
        self.bus: NatsBus

    @property
    def urls(self) -> list[str]:
        """One client URL for each nats-server."""
        if self.nats is not None:
            return self.nats.urls
        return [f"nats://{HOST}:{each['port']}" for each in self._embedded]

    def server_of(self, node: str) -> str:
        """The name of the nats-server on the host of *node*: the one that it prefers, or its own."""
        if self.nats is None:
            return f"{PLATFORM}-{node}"
        return self.nats.name((int(node.removeprefix("n")) - 1) % self.nats.size)

    def _embedded_servers(self, count: int) -> list[dict[str, Any]]:
        ports = [self._ports.take() for _ in range(2 * count)]
        routes = [f"{HOST}:{port}" for port in ports[count:]]
        return [{"port": ports[i], "cluster_port": ports[count + i], "routes": routes} for i in range(count)]

    def _environment(self, i: int) -> dict[str, str]:
        where: dict[str, Any] = {"history": str(self.history.path), "platform": PLATFORM}
        if self.nats is None:
            where["embedded"] = self._embedded[i]
        else:
            own = i % self.nats.size
            urls = (*self.nats.urls[own:], *self.nats.urls[:own])
            where["urls"] = self._urls_of(i) if self._urls_of is not None else urls
            where["server_name"] = self.nats.name(own)
        settings = msgspec.convert({**where, **self._settings}, Settings)
        return {"PHALANX_TEST": msgspec.json.encode(settings).decode()}

    # --- life

    async def __aenter__(self) -> Self:
        try:
            if self.nats is not None:
                self.nats.start()
                await self.nats.ready()
            self.nodes.start()
            self.bus = await self._connect()
            await self.wait_steady()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _connect(self) -> NatsBus:
        """Our own connection. Embedded servers come up with their nodes."""
        deadline = system.now() + 30
        while True:
            try:
                return await NatsBus.connect(NatsOptions(urls=tuple(self.urls)), name="benchmark", timeout=2)
            except (BusError, NatsUnusable):
                if system.now() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        """End everything and delete the files."""
        if hasattr(self, "bus"):
            await self.bus.close()
        self.nodes.stop()
        if self.nats is not None:
            self.nats.stop()
        self._ports.close()
        self._follower.close()
        self.history.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- what has happened

    def read(self) -> list[Event]:
        """Read on in the history; the new events, which ``events`` has now too."""
        new = self._follower.read()
        self.events += new
        return new

    def since(self, moment: float, *kinds: str) -> list[Event]:
        """The events of those *kinds* (none: all) from *moment* on, in order of time."""
        self.read()
        found = [e for e in self.events if e.at >= moment and (not kinds or e.kind in kinds)]
        return sorted(found, key=lambda event: event.at)

    async def next_active(
        self, since: float, *, timeout: float, other_than: str = "", app: str = APP
    ) -> Event:
        """The first ``active`` event after *since*. Raises TimeoutError, with the nodes' last words."""
        deadline = system.now() + timeout
        while True:
            for event in self.since(since, "active"):
                if event.app == app and event.node != other_than:
                    return event
            if system.now() > deadline:
                raise TimeoutError(
                    f"no node became active for {app} within {timeout:g} s\n{self.last_words()}"
                )
            await asyncio.sleep(LOOK_SECONDS)

    def forget(self) -> None:
        """Drop the events so far: reading goes on after them."""
        self.read()
        self.events.clear()

    def last_words(self) -> str:
        """The ends of the nodes' logs."""
        return "\n".join(f"--- {node.node}\n{node.log()[-2500:]}" for node in self.nodes)

    # --- the platform's state

    def active(self, app: str = APP) -> str:
        """The node that is active for *app*; empty while none is. Raises RuntimeError for two."""
        found = self.nodes.actives(app)
        if len(found) > 1:
            raise RuntimeError(f"{' and '.join(found)} say that they are active for {app}")
        return found[0] if found else ""

    async def wait_steady(self, *, steered: bool = False, timeout: float = STEADY_TIMEOUT_SECONDS) -> str:
        """Wait until nothing is missing; the active node of the first app.

        Each app has one active node and the others as standbys, each stream a leader and all replicas up
        to date; *steered*: and the apps' streams are not led on the host of their active node.
        Raises TimeoutError, saying what was missing.
        """
        deadline = system.now() + timeout
        while True:
            problem = await asyncio.to_thread(self._unready_nodes) or await self._unready_streams(steered)
            if not problem:
                return await asyncio.to_thread(self.active, self.apps[0])
            if system.now() > deadline:
                raise TimeoutError(f"after {timeout:g} s: {problem}\n{self.last_words()}")
            await asyncio.sleep(STEADY_LOOK_SECONDS)

    def _unready_nodes(self) -> str:
        for node in self.nodes:
            if not node.is_running:
                return f"node {node.node} does not run"
        for app in self.apps:
            if not self.active(app):
                return f"no node is active for {app}"
            standbys = sum(1 for node in self.nodes if node.is_standby(app))
            if standbys < len(self.nodes) - 1:
                return f"{app} has only {standbys} standbys"
        return ""

    async def _unready_streams(self, steered: bool) -> str:
        try:
            names: list[str] = (await self.bus.api("STREAM.NAMES", {}, timeout=2)).get("streams") or []
            for name in names:
                if problem := await self._unready_stream(name):
                    return problem
            for app in self.apps if steered else ():
                leader = await self.stream_leader(app)
                if leader == self.server_of(await asyncio.to_thread(self.active, app)):
                    return f"the stream of {app} is led by {leader}, on the host of its active node"
        except BusError as error:
            return str(error)
        return ""

    async def _unready_stream(self, stream: str) -> str:
        info = await self.bus.api(f"STREAM.INFO.{stream}", {}, timeout=2)
        cluster: dict[str, Any] = info.get("cluster") or {}
        if cluster and not cluster.get("leader"):
            return f"stream {stream} has no leader"
        replicas: list[dict[str, Any]] = cluster.get("replicas") or []
        behind = [r["name"] for r in replicas if not r.get("current") or r.get("offline") or r.get("lag", 0)]
        if behind:
            return f"stream {stream}: {', '.join(behind)} not up to date"
        missing = int(info["config"]["num_replicas"]) - 1 - len(replicas)
        return f"stream {stream} lacks {missing} replicas" if missing > 0 else ""

    def app_stream(self, app: str = APP) -> str:
        """The stream of *app*'s bucket."""
        return self.names.bucket_stream(self.names.app_bucket(app))

    async def stream_leader(self, app: str = APP) -> str:
        """The server that leads the stream of *app*. Raises BusError while nobody does."""
        info = await self.bus.api(f"STREAM.INFO.{self.app_stream(app)}", {}, timeout=2)
        cluster: dict[str, Any] = info.get("cluster") or {}
        return str(cluster.get("leader") or "")

    async def move_stream_leader(self, server: str, app: str = APP) -> bool:
        """Let *server* lead the stream of *app*; whether it does now."""
        stream = self.app_stream(app)
        with contextlib.suppress(BusError):
            if await self.stream_leader(app) == server:
                return True
            request = {"placement": {"preferred": server}}
            await self.bus.api(f"STREAM.LEADER.STEPDOWN.{stream}", request, timeout=2)
        for _ in range(30):
            with contextlib.suppress(BusError):
                if await self.stream_leader(app) == server:
                    return True
            await asyncio.sleep(0.1)
        return False

    async def step_down(self, app: str = APP) -> StepDownReply:
        """Ask the active node of *app* to hand over, as ``phalanx stepdown`` does. Raises BusError."""
        subject = self.names.control_subject(app, "stepdown")
        message = await self.bus.request(subject, b"{}", timeout=10)
        return msgspec.json.decode(message.data, type=StepDownReply)
