"""Real nats-servers, one or a cluster, for tests, benchmarks and trials.

Everything listens on 127.0.0.1 on free ports and lives in one temporary directory::

    async with NatsCluster(3) as nats:            # or: with NatsServer() as nats, in a plain script
        await connect(nats.urls)
        nats.kill(nats.index(nats.stream_leader("KV_prod_wiki")))

The methods are synchronous and take milliseconds; only ``ready()`` waits, and is awaitable.
Processes end with ``stop()``, at exit, and on Linux also when this process is killed (PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from phalanx.bus.binary import nats_server_binary

if TYPE_CHECKING:
    from phalanx.testing.netlab import Host

HOST = "127.0.0.1"
SYSTEM_USER = "sys"
"""User and password of the system account, for ``$SYS`` requests and for removing peers."""

POOL_SIZE = 3
ROUTES_PER_PAIR = POOL_SIZE + 1
"""The pool, and one route that the server keeps for the system account."""

_live: set[NatsCluster] = set()


class NatsCluster:
    """*n* nats-servers with JetStream, named n1, n2, … Server number i is counted from 0.

    *sync_always*: every stored message is synced to disk before it is acknowledged.
    *extra*: further configuration text for every server. *system_user*: define the system account's
    user; turn it off when *extra* has an ``accounts`` block. *advertise*: what each server tells clients
    of where it listens, for clients that must not find a way around a proxy. *hosts*: hosts of a ``NetLab``
    to run the servers in, one each; clients then have to be in the lab as well.
    """

    def __init__(
        self,
        n: int = 3,
        *,
        sync_always: bool = False,
        extra: str = "",
        system_user: bool = True,
        cluster_name: str = "test",
        advertise: Sequence[str] = (),
        hosts: Sequence[Host] = (),
    ) -> None:
        if n < 1:
            raise ValueError(f"a cluster needs at least one server, not {n}")
        if hosts and len(hosts) != n:
            raise ValueError(f"{n} servers need as many hosts, not {len(hosts)}")
        self.size = n
        self._hosts = list(hosts)
        self._sync_always, self._extra, self._system_user = sync_always, extra, system_user
        self._cluster_name, self._advertise = cluster_name, advertise
        self._ports = Ports()
        self._client = [self._ports.take() for _ in range(n)]
        self._route = [self._ports.take() for _ in range(n)]
        self._monitor = [self._ports.take() for _ in range(n)]
        self._names = [f"n{i + 1}" for i in range(n)]
        self._named = n
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * n
        self._frozen: set[int] = set()
        self.directory = Path(tempfile.mkdtemp(prefix="phalanx-nats-"))
        _live.add(self)

    # --- who is who

    @property
    def urls(self) -> list[str]:
        """One client URL for each server."""
        return [self.url(i) for i in range(self.size)]

    def url(self, i: int = 0) -> str:
        """The client URL of server *i*."""
        return f"nats://{self.address(i)}:{self._client[i]}"

    def address(self, i: int = 0) -> str:
        """The IP address of server *i*."""
        return self._hosts[i].address if self._hosts else HOST

    def system_url(self, i: int = 0) -> str:
        """A URL that logs in to the system account."""
        return f"nats://{SYSTEM_USER}:{SYSTEM_USER}@{self.address(i)}:{self._client[i]}"

    def port(self, i: int = 0) -> int:
        """The client port of server *i*."""
        return self._client[i]

    def route_port(self, i: int = 0) -> int:
        """The cluster port of server *i*."""
        return self._route[i]

    def monitor_url(self, i: int = 0) -> str:
        """The monitoring address of server *i*."""
        return f"http://{self.address(i)}:{self._monitor[i]}"

    def name(self, i: int = 0) -> str:
        """The server name of server *i*."""
        return self._names[i]

    def index(self, name: str | None) -> int:
        """The number of the server with that name. Raises ValueError if there is none."""
        if name is None or name not in self._names:
            raise ValueError(f"no server {name!r} among {self._names}")
        return self._names.index(name)

    def pid(self, i: int = 0) -> int:
        """The process id of server *i*. Raises RuntimeError when it does not run."""
        return self._process(i).pid

    def is_running(self, i: int = 0) -> bool:
        """Whether server *i*'s process exists (a frozen one does)."""
        process = self._processes[i]
        return process is not None and process.poll() is None

    def log(self, i: int = 0) -> str:
        """What server *i* has logged."""
        path = self.directory / f"{i}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- life and death of one server

    def start(self, i: int | None = None) -> None:
        """Start server *i* again on its port and store; without a number, all that do not run."""
        for each in range(self.size) if i is None else (i,):
            if not self.is_running(each):
                self._spawn(each)
                self._wait_listening(each)

    def kill(self, i: int = 0) -> None:
        """SIGKILL server *i* and wait until it is gone. Its store stays. Harmless if it is down."""
        process = self._processes[i]
        self._frozen.discard(i)
        if process is not None:
            process.kill()
            process.wait(10)
            self._processes[i] = None

    def terminate(self, i: int = 0, timeout: float = 15.0) -> None:
        """SIGTERM server *i* and wait until it is gone, at most *timeout* seconds, then SIGKILL."""
        self.thaw(i)
        self._process(i).terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process(i).wait(timeout)
        self.kill(i)

    def freeze(self, i: int = 0) -> None:
        """SIGSTOP server *i*: its connections stay open, but it answers nothing."""
        self._process(i).send_signal(signal.SIGSTOP)
        self._frozen.add(i)

    def thaw(self, i: int = 0) -> None:
        """SIGCONT server *i*."""
        self._process(i).send_signal(signal.SIGCONT)
        self._frozen.discard(i)

    def wipe(self, i: int = 0) -> None:
        """Kill server *i* and delete its store; ``start(i)`` brings it back with the same name, empty."""
        self.kill(i)
        shutil.rmtree(self._store(i), ignore_errors=True)

    def replace(self, i: int = 0) -> str:
        """Put a new server, with a new name and an empty store, on the ports of server *i*.

        Returns the new name. The old one stays a peer of the meta group until it is removed
        (``$JS.API.SERVER.REMOVE`` through ``system_url``).
        """
        self.wipe(i)
        self._named += 1
        self._names[i] = f"n{self._named}"
        self.start(i)
        return self._names[i]

    def stop(self) -> None:
        """SIGKILL all servers and delete their files. Harmless when done twice."""
        for i in range(self.size):
            self.kill(i)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._ports.close()
        _live.discard(self)

    # --- waiting, and who leads

    async def ready(self, timeout: float = 30.0) -> None:
        """Wait until every running server takes part and JetStream can place replicas on all of them.

        Raises TimeoutError, which says what was missing.
        """
        await asyncio.to_thread(self.wait_ready, timeout)

    def wait_ready(self, timeout: float = 30.0) -> None:
        """``ready()`` for plain scripts."""
        self.wait_until(self._unready, timeout)

    def wait_until(self, missing: Callable[[], str], timeout: float = 30.0) -> None:
        """Call *missing* until it returns an empty string; TimeoutError with its last answer if not."""
        deadline = time.monotonic() + timeout
        while problem := missing():
            for i in range(self.size):
                process = self._processes[i]
                if process is not None and process.poll() is not None:
                    how = f"nats-server {self._names[i]} exited with {process.returncode}"
                    raise RuntimeError(f"{how}:\n{self.log(i)[-3000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout:g} s: {problem}\n{self.log(0)[-2000:]}")
            time.sleep(0.01)

    def meta_leader(self) -> str | None:
        """The server that leads JetStream's meta group; None if no answering server knows one."""
        if self.size == 1:
            return self._names[0] if self._answering() else None
        for i in self._answering():
            leader = self._meta(i).get("leader")
            if leader:
                return str(leader)
        return None

    def stream_leader(self, stream: str) -> str | None:
        """The server that leads *stream*, by its own word; None while nobody does."""
        for i in self._answering():
            accounts: list[dict[str, Any]] = self.monitor(i, "/jsz?streams=1&accounts=1").get(
                "account_details", []
            )
            for detail in (d for account in accounts for d in account.get("stream_detail", [])):
                cluster: dict[str, Any] = detail.get("cluster") or {"leader": self._names[i]}
                if detail["name"] == stream and cluster.get("leader") == self._names[i]:
                    return self._names[i]
        return None

    def monitor(self, i: int, path: str, timeout: float = 0.5) -> dict[str, Any]:
        """What the monitoring port of server *i* answers to GET *path*; empty if it does not answer."""
        arguments = (self.address(i), self._monitor[i], path, timeout)
        # A server in a host is asked from there, so also one that is cut off from everybody.
        return self._hosts[i].call(_ask, *arguments) if self._hosts else _ask(*arguments)

    def _meta(self, i: int) -> dict[str, Any]:
        return self.monitor(i, "/jsz").get("meta_cluster") or {}

    def _answering(self) -> list[int]:
        return [i for i in range(self.size) if self.is_running(i) and i not in self._frozen]

    def _unready(self) -> str:
        answering = self._answering()
        if not answering:
            return "no server runs"
        # Last, because the server logs a warning for every health check that fails.
        return (
            (self.size > 1 and (self._unformed(answering) or self._unrouted(answering)))
            or self._unhealthy(answering)
            or ""
        )

    def _unhealthy(self, servers: Sequence[int]) -> str:
        for i in servers:
            health = self.monitor(i, "/healthz")
            if health.get("status") != "ok":
                return f"{self._names[i]}: {health or 'does not answer'}"
        return ""

    def _unformed(self, servers: Sequence[int]) -> str:
        """A meta leader exists, and it sees every one of these servers as a current peer."""
        leader = self.meta_leader()
        if leader is None or leader not in self._names:
            return "no meta leader"
        peers: list[dict[str, Any]] = self._meta(self.index(leader)).get("replicas") or []
        current = {str(p["name"]) for p in peers if p.get("current") and not p.get("offline")}
        absent = {self._names[i] for i in servers} - current - {leader}
        return f"meta leader {leader} does not see {sorted(absent)} as current" if absent else ""

    def _unrouted(self, servers: Sequence[int]) -> str:
        """Every pair is connected by all routes of its pool; with fewer, early requests get lost."""
        for i in servers:
            routes: list[dict[str, Any]] = self.monitor(i, "/routez").get("routes") or []
            remote = [str(route.get("remote_name")) for route in routes]
            for other in servers:
                if other != i and remote.count(self._names[other]) < ROUTES_PER_PAIR:
                    return f"{self._names[i]} has too few routes to {self._names[other]}"
        return ""

    # --- processes and their configuration

    def _process(self, i: int) -> subprocess.Popen[bytes]:
        process = self._processes[i]
        if process is None:
            raise RuntimeError(f"nats-server {self._names[i]} does not run")
        return process

    def _store(self, i: int) -> Path:
        return self.directory / f"js{i}"

    def _spawn(self, i: int) -> None:
        path = self.directory / f"{i}.conf"
        path.write_text(self._configuration(i))
        command = [nats_server_binary(), "-c", str(path)]
        with open(self.directory / f"{i}.log", "ab") as log, warnings.catch_warnings():
            # Python >= 3.12 warns of preexec_fn in processes with threads; ours only calls prctl.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._processes[i] = subprocess.Popen(
                self._hosts[i].command(*command) if self._hosts else command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def _wait_listening(self, i: int) -> None:
        """Wait until server *i* takes routes (some 10 ms), so that the next one finds it at once.

        Servers that start in the same instant dial each other crosswise, close the duplicates, and
        dial again only after a second: that, not the election, would dominate the time to be ready.
        A server that does not start is reported by ``wait_ready()``.
        """
        deadline = time.monotonic() + 1.0
        while self.size > 1 and self.is_running(i) and time.monotonic() < deadline:
            place = (self.address(i), self._route[i])
            if self._hosts[i].call(_listens, *place) if self._hosts else _listens(*place):
                return
            time.sleep(0.002)

    def _configuration(self, i: int) -> str:
        sync = ", sync_interval: always" if self._sync_always else ""
        lines = [
            f"server_name: {self._names[i]}",
            f'listen: "{self.address(i)}:{self._client[i]}"',
            f'http: "{self.address(i)}:{self._monitor[i]}"',
            f'jetstream {{ store_dir: "{self._store(i)}", max_file: 20G, max_mem: 1G{sync} }}',
            'lame_duck_grace_period: "200ms"',
            'lame_duck_duration: "30s"',
        ]
        if self._advertise:
            lines.append(f'client_advertise: "{self._advertise[i]}"')
        if self._system_user:
            user = f"{{ user: {SYSTEM_USER}, password: {SYSTEM_USER} }}"
            lines.append(f"accounts {{ $SYS {{ users: [{user}] }} }}")
        if self.size > 1:
            others = [j for j in range(self.size) if j != i]
            routes = ", ".join(f'"nats://{self.address(j)}:{self._route[j]}"' for j in others)
            lines.append(
                f'cluster {{ name: {self._cluster_name}, listen: "{self.address(i)}:{self._route[i]}", '
                f"pool_size: {POOL_SIZE}, routes: [{routes}] }}"
            )
        return "\n".join([*lines, self._extra, ""])

    # --- lifetimes

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            self.start()
            await self.ready()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _ask(address: str, port: int, path: str, timeout: float) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return cast("dict[str, Any]", json.loads(connection.getresponse().read()))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 0.2):
        return True
    return False


class NatsServer(NatsCluster):
    """One nats-server with JetStream and without a cluster."""

    def __init__(self, *, sync_always: bool = False, extra: str = "", system_user: bool = True) -> None:
        super().__init__(1, sync_always=sync_always, extra=extra, system_user=system_user)


class Ports:
    """Free ports on 127.0.0.1 that stay ours across restarts of the server that uses them.

    They lie below the ephemeral range, so no outgoing connection can take one meanwhile; on Linux
    an abstract socket with the port's name keeps other processes that use this class away.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []

    def take(self) -> int:
        """A port that nobody listens on and nobody has claimed."""
        for _ in range(1000):
            port = random.SystemRandom().randrange(10_000, 32_000)
            if self._claim(port):
                return port
        raise RuntimeError("no free port on 127.0.0.1")

    def close(self) -> None:
        """Give all ports back."""
        for claim in self._claims:
            claim.close()
        self._claims.clear()

    def _claim(self, port: int) -> bool:
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                return False
        if sys.platform != "linux":
            return True
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0phalanx-test-port-{port}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True


def stop_leftover(data_dir: str | Path) -> int | None:
    """SIGKILL the embedded nats-server that a node left behind in *data_dir*, and wait for its end.

    Only a process that the record there proves to be that server is touched. Returns its pid, or None
    if none runs.
    """
    from phalanx.bus.server_process import ServerProcess

    found = ServerProcess.find(Path(data_dir).absolute() / "nats")
    if found is None:
        return None
    found.send(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while found.is_alive():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nats-server {found.pid} did not end within 10 s of SIGKILL")
        time.sleep(0.005)
    return found.pid


def _die_with_parent() -> Callable[[], None] | None:
    """Code for the child that makes the kernel kill it when this process dies (Linux).

    The signal follows the *thread* that started the child, so only the main thread may ask for it.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()
    set_pdeathsig = 1  # PR_SET_PDEATHSIG, linux/prctl.h

    def apply() -> None:
        prctl(set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return apply


@atexit.register
def _stop_all() -> None:
    for cluster in list(_live):
        cluster.stop()
