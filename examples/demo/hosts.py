"""Three hosts on one machine: each is a node, its keeper, and the NATS server that it runs beside itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import msgspec

from examples.demo.node import PLATFORM, Settings
from phalanx import system
from phalanx.testing.nats import HOST, Ports, stop_leftover
from phalanx.testing.nodes import NodeProcess

_ROOT = Path(__file__).parents[2]


class Line(NamedTuple):
    """A line that a node has logged. ``at`` is Unix time."""

    at: float
    who: str
    level: str
    text: str


class Host:
    """One of them."""

    def __init__(self, name: str, directory: Path, http_port: int, settings: Settings) -> None:
        self.name, self.settings = name, settings
        www = Path(settings.www)
        www.mkdir(parents=True)
        (www / "node.txt").write_text(name)
        databases, temporary = directory / "databases", directory / "tmp"
        databases.mkdir()
        temporary.mkdir()
        self.node = NodeProcess(
            (sys.executable, "-m", "examples.demo.node"),
            name,
            directory,
            http_port,
            {
                "PHALANX_DATABASES": str(databases),
                # A killed node leaves its Litestream's socket until the next start: not on this machine.
                "TMPDIR": str(temporary),
                "DEMO_NODE": msgspec.json.encode(settings).decode(),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
            },
        )
        self._read_to = 0
        self._last_at = system.wall()

    # --- faults

    def kill_nats(self) -> int | None:
        """SIGKILL the NATS server of this host; its pid. The node starts it again."""
        return stop_leftover(self.node.data_dir)

    def helpers(self, name: str = "") -> list[int]:
        """Processes that the node has started, but its keeper and NATS server; *name* in their command."""
        found: list[int] = []
        for pid in _descendants(self.node.pid):
            command = _command(pid)
            if name in command and "nats-server" not in command and "phalanx.keeper" not in command:
                found.append(pid)
        return found

    def die(self, programs: Sequence[int]) -> None:
        """Everything of this host at once, with the processes *programs*, as if the power had failed."""
        victims = list({self.node.keeper_pid: 0, self.node.pid: 0, **dict.fromkeys(programs, 0)})
        for pid in victims:
            # Stopped first, so that none of them can act on the end of another.
            _signal(pid, signal.SIGSTOP)
        for pid in victims:
            _signal(pid, signal.SIGKILL)
        self.kill_nats()
        self.node.wait(10)

    # --- what it says

    def app(self) -> dict[str, Any]:
        """The app in the node's own /status; empty when it does not answer."""
        apps: list[dict[str, Any]] = self.node.status().get("apps") or []
        return next((app for app in apps if app["name"] == self.settings.app), dict[str, Any]())

    def problem(self) -> str:
        """What is missing before this host is healthy; empty when it is."""
        if not self.node.is_running:
            return f"node {self.name} does not run"
        status = self.node.status()
        if not status:
            return f"node {self.name} does not answer yet"
        role = next((app["role"] for app in status["apps"]), "")
        if not status["ready"] or role not in ("active", "standby"):
            return f"node {self.name} is {role or 'starting'}"
        health = self.monitor("/healthz").get("status", "unreachable")
        return "" if health == "ok" else f"NATS server {self.name} is {health}"

    def leads_stream(self) -> bool:
        """Whether its NATS server leads the app's bucket, or the log of its database."""
        app, here = self.settings.app, f"{PLATFORM}-{self.name}"
        streams = (f"KV_{PLATFORM}_{app}", f"{PLATFORM}_{app}_wal")
        answer = self.monitor("/jsz?streams=1&accounts=1")
        for account in cast("list[dict[str, Any]]", answer.get("account_details") or []):
            for stream in cast("list[dict[str, Any]]", account.get("stream_detail") or []):
                cluster = cast("dict[str, Any]", stream.get("cluster") or {})
                if stream["name"] in streams and cluster.get("leader") == here:
                    return True
        return False

    def monitor(self, path: str) -> dict[str, Any]:
        """What the NATS server's monitoring answers; empty if it does not."""
        connection = http.client.HTTPConnection(HOST, self.settings.monitor_port, timeout=0.5)
        try:
            connection.request("GET", path)
            return cast("dict[str, Any]", json.loads(connection.getresponse().read()))
        except (OSError, http.client.HTTPException, ValueError):
            return {}
        finally:
            connection.close()

    def new_lines(self) -> Iterator[Line]:
        """What node and keeper have logged since the last call."""
        if not self.node.log_path.exists():
            return
        with self.node.log_path.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for raw in whole.decode(errors="replace").splitlines():
            line = self._parse(raw)
            self._last_at = line.at
            yield line

    def _parse(self, raw: str) -> Line:
        try:
            entry = json.loads(raw)
            at = datetime.fromisoformat(entry["time"]).timestamp()
            return Line(at, self.name, entry["level"], entry["message"])
        except (ValueError, KeyError, TypeError):
            pass
        # The keeper's log, which is plain text: time level logger: message
        found = re.match(r"(\S+ \S+),(\d+) (\w+) phalanx\S*: (.*)", raw)
        if found is None:
            return Line(self._last_at, self.name, "debug", raw)
        at = datetime.fromisoformat(f"{found[1]}.{found[2]}").timestamp()
        return Line(at, f"{self.name} keeper", found[3].lower(), found[4])


class Hosts:
    """All of them, in a temporary folder, with free ports. Nothing is left of them after ``with``."""

    def __init__(self, run: str, app: str, count: int = 3) -> None:
        self.app = app
        self.directory = Path(tempfile.mkdtemp(prefix="phalanx-demo-"))
        self._ports = Ports()
        take = self._ports.take
        self.backend_port = take()
        cluster = [take() for _ in range(count)]
        routes = tuple(f"{HOST}:{port}" for port in cluster)
        self._hosts: dict[str, Host] = {}
        for i in range(count):
            name = f"n{i + 1}"
            directory = self.directory / name
            settings = Settings(
                run, app, self.backend_port, str(directory / "www"), take(), cluster[i], take(), routes
            )
            self._hosts[name] = Host(name, directory, take(), settings)

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def start(self) -> None:
        """Start all nodes that do not run, as a service manager would."""
        for host in self:
            if not host.node.is_running:
                host.node.start()

    def active(self) -> tuple[str, int]:
        """The node that says that it is active, and its epoch; ``("", 0)`` if none does."""
        for host in self:
            if host.node.is_running and (app := host.app()) and app["role"] == "active":
                return host.name, int(app["epoch"])
        return "", 0

    def problem(self) -> str:
        """What keeps the whole from being healthy; empty when it is."""
        problem = next((problem for host in self if (problem := host.problem())), "")
        return problem or ("" if self.active()[0] else "no node is active")

    def urls(self) -> tuple[str, ...]:
        """Where the NATS servers listen."""
        return tuple(f"nats://{HOST}:{host.settings.nats_port}" for host in self)

    def stop(self, keep_logs: Path | None = None) -> None:
        """Kill everything and delete the files; logs are copied to *keep_logs* before."""
        for host in self:
            host.node.stop()
        if keep_logs is not None:
            for host in self:
                target = keep_logs / self.app / host.name
                target.mkdir(parents=True, exist_ok=True)
                data = host.node.data_dir / "nats"
                for path in (host.node.log_path, data / "nats.log", Path(f"{host.settings.www}.log")):
                    if path.exists():
                        shutil.copy(path, target / path.name)
        self._ports.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found + [below for child in found for below in _descendants(child)]


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
