"""Nodes as real processes, to be killed, frozen and cut off; and how to wait for what follows.

::

    with NatsCluster(3) as nats, Nodes(["python", "mine.py"], nats.urls, count=3) as nodes:
        active = await nodes.wait_for_active("wiki")
        nodes[active].kill()
        await nodes.wait_for_active("wiki", other_than=active)

A node's program gets its identity by the environment (``PHALANX_NODE`` and so on), so it is the very
program that runs in production. For hooks alone use ``async with Platform(...)`` in the test's own
process; but do not fence such a node: its keeper would kill the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from phalanx import system
from phalanx.bus.server_process import ServerProcess
from phalanx.keeper import note
from phalanx.testing import faults
from phalanx.testing.nats import HOST, Ports, stop_leftover
from phalanx.testing.netlab import Host, http_get

_POLL_SECONDS = 0.003


class NodeProcess:
    """One node: a program, its keeper, its data directory, its HTTP port; inside *host*, if there is one."""

    def __init__(
        self,
        command: Sequence[str],
        node: str,
        directory: Path,
        http_port: int,
        env: Mapping[str, str],
        host: Host | None = None,
    ) -> None:
        self.command, self.node, self.directory = list(command), node, directory
        self.host = host
        self.http_port = http_port
        self.env = dict(env)
        self.data_dir = directory / "data"
        self.log_path = directory / "log"
        directory.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._keepers: set[system.ProcessRef] = set()

    # --- life

    def start(self) -> None:
        """Start the node; returns at once. Its data directory stays from life to life."""
        if self.is_running:
            raise RuntimeError(f"node {self.node} runs already")
        environment = {
            **os.environ,
            "PHALANX_NODE": self.node,
            "PHALANX_DATA": str(self.data_dir),
            "PHALANX_HTTP": f"{HOST}:{self.http_port}",
            **self.env,
        }
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                self.host.command(*self.command) if self.host is not None else self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the node's process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The node's process id. Raises RuntimeError when it does not run."""
        if self._process is None:
            raise RuntimeError(f"node {self.node} was never started")
        return self._process.pid

    @property
    def keeper_pid(self) -> int:
        """The process id of the node's keeper. Raises RuntimeError while there is none."""
        for pid in _children(self.pid):
            if b"phalanx.keeper" in _command_line(pid):
                self._keepers.add(system.ProcessRef.of(pid))
                return pid
        if (kept := note.read(self.data_dir)) is not None and kept.lives:  # of an earlier life, in a pause
            self._keepers.add(system.ProcessRef(kept.pid, kept.start_time))
            return kept.pid
        raise RuntimeError(f"node {self.node} has no keeper")

    def kill(self) -> None:
        """SIGKILL the node's process (its keeper lives) and wait until it is gone."""
        self._note_keeper()
        faults.kill(self.pid)
        self.wait(10)

    def kill_keeper(self) -> None:
        """SIGKILL the keeper; the node lives."""
        faults.kill(self.keeper_pid)

    def kill_both(self) -> None:
        """SIGKILL node and keeper at the same moment, as a power loss would."""
        keeper = self.keeper_pid
        # Stopped first, so that the keeper cannot act between the two signals.
        os.kill(keeper, signal.SIGSTOP)
        faults.kill(self.pid)
        faults.kill(keeper)
        self.wait(10)

    @property
    def server_pid(self) -> int:
        """The process id of the node's embedded nats-server. Raises RuntimeError when none runs."""
        found = ServerProcess.find(self.data_dir.absolute() / "nats")
        if found is None:
            raise RuntimeError(f"node {self.node} has no embedded nats-server")
        return found.pid

    def kill_host(self) -> None:
        """SIGKILL node, keeper and embedded nats-server at the same moment, as the loss of the host would."""
        victims = [self.keeper_pid, self.server_pid, self.pid]
        # All stopped first, so that none of them can act on the end of another.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in victims:
                os.kill(pid, number)
        self.wait(10)
        stop_leftover(self.data_dir)  # waits for its end

    def freeze(self, *, keeper: bool = False) -> None:
        """SIGSTOP the node (and its keeper)."""
        self._note_keeper()
        if keeper:
            faults.freeze(self.keeper_pid)
        faults.freeze(self.pid)

    def thaw(self, *, keeper: bool = False) -> None:
        """SIGCONT. A node whose session has run out meanwhile dies of it at once."""
        keeper_pid = self.keeper_pid if keeper else 0
        faults.thaw(self.pid)
        if keeper_pid:
            faults.thaw(keeper_pid)

    def freeze_keeper(self) -> None:
        """SIGSTOP the keeper alone."""
        faults.freeze(self.keeper_pid)

    def thaw_keeper(self) -> None:
        """SIGCONT the keeper."""
        faults.thaw(self.keeper_pid)

    def terminate(self) -> None:
        """SIGTERM: the node hands everything over and ends. Does not wait."""
        self._note_keeper()
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the end of the node's process; its exit code. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise RuntimeError(f"node {self.node} was never started")
        return self._process.wait(timeout)

    def stop(self) -> None:
        """End node, keeper, and an embedded server, by SIGKILL, and wait. Harmless when done twice."""
        self._note_keeper()
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                faults.thaw(self.pid)
            self._process.kill()
            self._process.wait(10)
        for keeper in self._keepers:
            if keeper.alive():
                faults.kill(keeper.pid)
        # A keeper that was killed cannot end what it kept.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            registered = json.loads((self.data_dir / "registered.json").read_bytes())
            for resource in registered["resources"]:
                system.kill_marked(resource["id"], resource["pgid"] or None)
        stop_leftover(self.data_dir)

    def _note_keeper(self) -> None:
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            _ = self.keeper_pid

    # --- what it says

    def get(self, path: str, timeout: float = 0.5) -> tuple[int, bytes]:
        """GET from the node's HTTP server: status and body; status 0 when it does not answer."""
        arguments = (HOST, self.http_port, path, timeout)
        return self.host.get(*arguments) if self.host is not None else http_get(*arguments)

    def status(self) -> dict[str, Any]:
        """The node's /status; empty when it does not answer."""
        code, body = self.get("/status")
        return cast("dict[str, Any]", json.loads(body)) if code == 200 else {}

    def is_active(self, app: str) -> bool:
        """Whether the node says that it is active for *app*."""
        return self.get(f"/apps/{app}/active")[0] == 200

    def is_standby(self, app: str) -> bool:
        """Whether the node says that it could take over *app*."""
        return self.get(f"/apps/{app}/standby")[0] == 200

    def log(self) -> str:
        """What the node has logged, in all its lives."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


class Nodes:
    """Several nodes of one program. ``nodes["n1"]``, iteration, ``with``; started by ``start()`` or ``with``.

    *command*: the program. *nats*: URLs, one list for all (rotated, so that node i prefers server i).
    *env* is added to every node's environment; *env_of* to that of one. *hosts*: hosts of a ``NetLab`` for
    the nodes, one each.
    """

    def __init__(
        self,
        command: Sequence[str],
        nats: Sequence[str] = (),
        *,
        count: int = 3,
        env: Mapping[str, str] | None = None,
        env_of: Callable[[int], Mapping[str, str]] | None = None,
        hosts: Sequence[Host] = (),
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="phalanx-nodes-"))
        self._ports = Ports()
        self._nodes: dict[str, NodeProcess] = {}
        for i in range(count):
            urls = ",".join([*nats[i % len(nats) :], *nats[: i % len(nats)]]) if nats else ""
            own = {**({"PHALANX_NATS": urls} if urls else {}), **(env or {}), **(env_of(i) if env_of else {})}
            name = f"n{i + 1}"
            host = hosts[i] if hosts else None
            folder = self.directory / name
            self._nodes[name] = NodeProcess(command, name, folder, self._ports.take(), own, host)

    def __getitem__(self, node: str) -> NodeProcess:
        return self._nodes[node]

    def __iter__(self) -> Iterator[NodeProcess]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def start(self) -> None:
        """Start all that do not run; returns at once."""
        for node in self:
            if not node.is_running:
                node.start()

    def stop(self) -> None:
        """End everything and delete the files."""
        for node in self:
            node.stop()
        self._ports.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def actives(self, app: str) -> list[str]:
        """The nodes that say that they are active for *app*, at this moment or nearly."""
        return [node.node for node in self if node.is_running and node.is_active(app)]

    async def wait_for_active(self, app: str, *, other_than: str | None = None, timeout: float = 30.0) -> str:
        """Wait until a node (*other_than* that one) is active for *app*; its id. Raises TimeoutError."""

        def found() -> str:
            return next((n for n in self.actives(app) if n != other_than), "")

        return await self.wait_until(found, timeout, f"no node is active for {app}")

    async def wait_for_standbys(self, app: str, count: int, *, timeout: float = 30.0) -> None:
        """Wait until *count* nodes are standbys of *app*."""
        await self.wait_until(
            lambda: sum(1 for node in self if node.is_running and node.is_standby(app)) >= count,
            timeout,
            f"fewer than {count} standbys of {app}",
        )

    async def wait_until(self, condition: Callable[[], Any], timeout: float, problem: str) -> Any:
        """Ask until *condition* is true (its value is returned). Raises TimeoutError with the nodes' logs."""
        deadline = time.monotonic() + timeout
        while True:
            value = await asyncio.to_thread(condition)
            if value:
                return value
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {node.node}\n{node.log()[-3000:]}" for node in self)
                raise TimeoutError(f"after {timeout:g} s: {problem}\n{logs}")
            await asyncio.sleep(_POLL_SECONDS)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


PROGRAM = (sys.executable, "-m", "phalanx.testing.program")
"""The command of the test program, see ``phalanx.testing.program``."""


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
