"""``phalanx dev``: a whole platform on this machine, to try things out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from phalanx import system
from phalanx.app import NodeApp
from phalanx.bus.embedded import EmbeddedServer
from phalanx.cli import exits, output
from phalanx.cli.child import STOP_SECONDS, Child
from phalanx.cli.target import Overrides, load
from phalanx.client import PlatformClient
from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig
from phalanx.config.reader import DATABASES
from phalanx.errors import ConfigError, PhalanxError, StartError
from phalanx.preflight import cannot_listen

HOST = "127.0.0.1"
HTTP_PORT, NATS_PORT, CLUSTER_PORT = 7420, 4222, 6222
UP_SECONDS = 60.0
_COLORS = (
    "cyan",
    "green",
    "magenta",
    "yellow",
    "blue",
    "bright_cyan",
    "bright_green",
    "bright_magenta",
    "red",
)


def dev(
    target: Annotated[str, Parameter(help="A phalanx.toml, or module:name of a Platform.")],
    /,
    *,
    nodes: Annotated[int, Parameter(help="How many nodes.")] = 3,
    data_dir: Annotated[
        str | None, Parameter(help="Where to keep everything; else a temporary folder.")
    ] = None,
    keep: Annotated[bool, Parameter(help="Keep the temporary folder.")] = False,
    no_restart: Annotated[bool, Parameter(help="A node that dies stays dead.")] = False,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Run a whole platform on this machine, until Ctrl-C.

    Several nodes and their own NATS servers. Each node is a process of its own, so kill, freeze and stop
    them at will; one that died is started again after 5 seconds. The NATS of TARGET is not used: with three
    nodes or more a cluster of three servers is started on free ports of 127.0.0.1, else one server.
    """
    if not 1 <= nodes <= 9:
        raise ConfigError("--nodes", nodes, "out of range", "choose 1 to 9")
    folder = Path(data_dir).absolute() if data_dir else Path(tempfile.mkdtemp(prefix="phalanx-dev-"))
    try:
        os.environ[DATABASES] = str(_databases(folder, "node-1"))
        with Overrides(node="node-1").applied():
            platform = load(target)
        login = _login(platform.config)
        _make_database_folders(platform.apps.values(), folder, nodes)
        name = platform.config.name
        return asyncio.run(_Dev(target, name, folder, nodes, login, json).run(restart=not no_restart))
    finally:
        if data_dir is None and not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _make_database_folders(apps: Iterable[NodeApp], folder: Path, nodes: int) -> None:
    """Each node has databases of its own: where their paths are relative, the folders that these name."""
    base = _databases(folder, "node-1")
    declared = [(app.name, app.config.database) for app in apps if app.config.database is not None]
    for app, database in declared:
        if not Path(database.path).is_relative_to(base) and nodes > 1:
            raise ConfigError(
                f"apps.{app}.database.path",
                database.path,
                "all nodes of phalanx dev would have the same file",
                "write a relative path, or try it with --nodes 1",
            )
    for number in range(1, nodes + 1):
        here = _databases(folder, f"node-{number}")
        for _, database in declared:
            if Path(database.path).is_relative_to(base):
                (here / Path(database.path).relative_to(base)).parent.mkdir(parents=True, exist_ok=True)


def _databases(folder: Path, node: str) -> Path:
    return folder / node / "databases"


def _login(config: PlatformConfig) -> tuple[str, str]:
    """What the servers ask for, so that the login that is declared gives way. Mostly nothing."""
    nats = config.nats
    if not isinstance(nats, NatsOptions):
        return "", ""
    if nats.tls_ca or nats.tls_cert:
        raise ConfigError(
            "nats.tls_ca" if nats.tls_ca else "nats.tls_cert",
            nats.tls_ca or nats.tls_cert,
            "the NATS servers of phalanx dev have no TLS",
            "try it with a declaration without TLS",
        )
    declared = (nats.user, nats.token, nats.nkey_seed, nats.nkey_seed_file, nats.credentials)
    return ("dev", secrets.token_hex(8)) if any(declared) else ("", "")


class _Dev:
    """The servers, the nodes, and what is printed."""

    def __init__(
        self, target: str, platform: str, folder: Path, count: int, login: tuple[str, str], json: bool
    ) -> None:
        self._target, self._platform, self._folder, self._json = target, platform, folder, json
        self._user, self._password = login
        self._names = [f"node-{number}" for number in range(1, count + 1)]
        self._width = max(len(name) for name in self._names)
        self._children: list[Child] = []
        self._urls: list[str] = []
        self._stopping = asyncio.Event()
        self._asked = 0

    async def run(self, *, restart: bool) -> int:
        """Until a signal, or until no node runs any more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        async with self._servers():
            if self._stopping.is_set():
                return exits.OK
            self._children = list(self._make_children())
            running = [
                asyncio.create_task(child.run(restart=restart), name=child.node) for child in self._children
            ]
            announcing = asyncio.create_task(self._announce(), name="announce")
            stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
            everything = asyncio.gather(*running)
            try:
                await asyncio.wait({everything, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                announcing.cancel()
                stopping.cancel()
                await asyncio.gather(announcing, stopping, return_exceptions=True)
                await self._end(running)
            codes = [task.result() for task in running]
        self._tell("stopped", "", "everything has ended")
        return exits.OK if self._stopping.is_set() else _worst(codes)

    def _on_signal(self) -> None:
        self._asked += 1
        self._stopping.set()
        for child in self._children:
            if self._asked <= 2:
                child.stop()
            else:
                child.kill()

    async def _end(self, running: list[asyncio.Task[int]]) -> None:
        """All nodes at once: gracefully, else by force. Returns when none is left."""
        for child in self._children:
            if self._asked == 0:
                child.stop()
        _, late = await asyncio.wait(running, timeout=STOP_SECONDS)
        for child in self._children:
            if child.pid:
                self._tell("log", child.node, f"does not end within {STOP_SECONDS:g} s: killed")
                child.kill()
        if late:
            await asyncio.wait(late)

    # --- NATS

    @contextlib.asynccontextmanager
    async def _servers(self) -> AsyncGenerator[None]:
        """Three NATS servers that form a cluster, or one."""
        servers = self._make_servers()
        try:
            await _all(server.start() for server in servers)
            await _all(server.wait_ready(UP_SECONDS) for server in servers)
            yield
        finally:
            # Nobody is left to hand anything to: no lame duck.
            await _all(server.stop(lame_duck_seconds=0) for server in servers)

    def _make_servers(self) -> list[EmbeddedServer]:
        count = 3 if len(self._names) >= 3 else 1
        ports = _free_ports(NATS_PORT, count)
        cluster_ports = _free_ports(CLUSTER_PORT, count) if count > 1 else [CLUSTER_PORT]
        routes = [f"{HOST}:{port}" for port in cluster_ports] if count > 1 else []
        login = f"{self._user}:{self._password}@" if self._user else ""
        self._urls = [f"nats://{login}{HOST}:{port}" for port in ports]
        return [
            EmbeddedServer(
                EmbeddedNats(
                    host=HOST,
                    port=port,
                    cluster_port=cluster_port,
                    routes=routes,
                    sync="2m",  # a try-out need not survive a power cut
                    user=self._user,
                    password=self._password,
                ),
                platform=self._platform,
                node=f"nats-{number}",
                data_dir=self._folder / f"nats-{number}",
                on_event=lambda kind, detail, name=f"nats-{number}": self._tell(
                    "log", name, f"{kind}: {detail}"
                ),
            )
            for number, (port, cluster_port) in enumerate(zip(ports, cluster_ports, strict=True), 1)
        ]

    # --- nodes

    def _make_children(self) -> Iterator[Child]:
        ports = _free_ports(HTTP_PORT, len(self._names))
        for number, (name, port) in enumerate(zip(self._names, ports, strict=True)):
            first = number % len(self._urls)
            env = {
                "PHALANX_NATS": ",".join([*self._urls[first:], *self._urls[:first]]),
                DATABASES: str(_databases(self._folder, name)),
            }
            yield Child(name, self._target, env, self._folder / name, f"{HOST}:{port}", self._tell)

    # --- what is said

    def _tell(self, kind: str, node: str, text: str) -> None:
        if self._json:
            key = "line" if kind == "log" else "text"
            output.emit({"event": kind, "time": system.wall(), "node": node, key: text})
            return
        if not node:
            output.say((f"phalanx dev: {text}", "bold"))
            return
        number = self._names.index(node) if node in self._names else len(_COLORS) - 1
        shown = text if kind == "log" else f"--- {kind}: {text}"
        output.say((f"{node:<{self._width}} | ", _COLORS[number % len(_COLORS)]), shown)

    async def _announce(self) -> None:
        """Say how to try things, once all nodes answer and every app is active somewhere."""
        options = NatsOptions(
            urls=[f"nats://{url.rpartition('@')[2].removeprefix('nats://')}" for url in self._urls],
            user=self._user,
            password=self._password,
        )
        deadline = system.now() + UP_SECONDS
        while True:
            try:
                async with PlatformClient(self._platform, options) as client:
                    active = await self._wait_up(client, deadline)
            except PhalanxError as error:
                if system.now() > deadline:
                    self._tell("log", self._names[0], f"whether all is up cannot be seen: {error}")
                    return
                continue
            break
        if active is not None:
            self._say_up(active)
        else:
            self._tell("log", self._names[0], f"not everything is up after {UP_SECONDS:g} s; see above")

    async def _wait_up(self, client: PlatformClient, deadline: float) -> dict[str, str] | None:
        while True:
            active = await self._active_nodes(client)
            if active is not None or system.now() > deadline:
                return active
            await asyncio.sleep(0.2)

    async def _active_nodes(self, client: PlatformClient) -> dict[str, str] | None:
        """The active node of each app, once everything is up."""
        try:
            found = await client.status()
        except PhalanxError:
            return None  # the first node is still making the platform
        if {status.node for status in found if status.connected} != set(self._names):
            return None
        apps = {app.name for status in found for app in status.apps}
        active = {app.name: status.node for status in found for app in status.apps if app.role == "active"}
        return active if set(active) == apps else None

    def _say_up(self, active: dict[str, str]) -> None:
        if self._json:
            nodes = [
                {"node": c.node, "pid": c.pid, "http": c.http, "data_dir": str(c.data_dir)}
                for c in self._children
            ]
            output.emit(
                {
                    "event": "up",
                    "time": system.wall(),
                    "platform": self._platform,
                    "nats": self._urls,
                    "data_dir": str(self._folder),
                    "nodes": nodes,
                    "active": active,
                }
            )
            return
        lines = [f"platform {self._platform} is up; files are in {self._folder}"]
        for child in self._children:
            leads = ", ".join(app for app, node in active.items() if node == child.node)
            what = f"  active for {leads}" if leads else ""
            lines.append(f"  {child.node}  http://{child.http}/status  pid {child.pid}{what}")
        urls = ",".join(self._urls)
        lines += [
            "in another terminal:",
            f"  export PHALANX_PLATFORM={self._platform} PHALANX_NATS={urls}",
            "  phalanx status --watch",
            "  phalanx audit --follow",
        ]
        pids = {child.node: child.pid for child in self._children}
        for app, node in list(active.items())[:1]:
            lines.append(f"  phalanx stepdown {app}")
            lines.append(f"  kill -9 {pids[node]}    # {node}, active for {app}: another one takes over")
        lines.append("Ctrl-C ends everything.")
        for line in lines:
            output.say(("phalanx dev: ", "bold"), line)


def _worst(codes: list[int]) -> int:
    """2 if a node could not start, else 1 if one failed."""
    if exits.BAD_INPUT in codes:
        return exits.BAD_INPUT
    return exits.NO if any(codes) else exits.OK


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """All at once; the first error is raised when all have ended."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _free_ports(first: int, count: int) -> list[int]:
    """*count* ports on loopback that nobody listens on, from *first* upwards."""
    found: list[int] = []
    for port in range(first, min(first + 1000, 65536)):
        if cannot_listen(HOST, port) is None:
            found.append(port)
            if len(found) == count:
                return found
    raise StartError(f"no {count} free ports on {HOST} from {first} on", "stop what uses them")
