"""Nodes with a virtual address, each on a host of its own, and a client on another: on a lab's network.

::

    with VipStage() as stage:
        active = stage.settled()
        stage.nodes[active].kill()
        stage.wait_for_active(other_than=active)

Needs root, as ``phalanx.testing.netlab`` does. The first hosts have one node each; then comes the client,
then a host with the NATS server.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, cast

from phalanx.bus.binary import nats_server_binary
from phalanx.testing.netlab import Host, NetLab
from phalanx.testing.nodes import NodeProcess

T = TypeVar("T")

APP = "wiki"
PORT = 8080
_NATS_PORT, _HTTP_PORT = 4222, 7420
WEB = Path(__file__).with_name("web.py")
"""The program, a file that runs by itself: ``python -I WEB PORT``."""
"""The program, a file that runs by itself."""
_POLL_SECONDS = 0.005


class Answer(NamedTuple):
    """Who answered a request, and under which epoch; empty and 0 if nobody did."""

    node: str = ""
    epoch: int = 0


class VipStage:
    """*count* nodes of one app with the address ``vip`` (and, with *ipv6*, ``vip6``).

    *vip*: more fields of the addresses' declarations; *app*, *platform*: more of the app's and the platform's
    table. *start*: whether the nodes are started at once.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        ipv6: bool = False,
        ttl: float = 2.0,
        vip: Mapping[str, object] | None = None,
        app: Mapping[str, object] | None = None,
        platform: Mapping[str, object] | None = None,
        start: bool = True,
        start_seconds: float = 0.0,
    ) -> None:
        self.lab = NetLab(count + 2, ipv6=ipv6)
        self.directory = Path(tempfile.mkdtemp(prefix="phalanx-vip-"))
        self.vip = self.lab.address(100)
        self.vip6 = self.lab.address6(0x100) if ipv6 else ""
        self.nodes: dict[str, NodeProcess] = {}
        self.names = [f"n{i + 1}" for i in range(count)]
        self._ttl, self._start = ttl, start
        self._vip, self._app, self._platform = dict(vip or {}), dict(app or {}), dict(platform or {})
        self._start_seconds = start_seconds

    # --- the parts

    @property
    def client(self) -> Host:
        """A host without a node."""
        return self.lab[len(self.names)]

    def host(self, node: str) -> Host:
        """The host of *node*."""
        return self.lab[self.names.index(node)]

    def other(self, node: str) -> str:
        """The first node that is not *node*."""
        return next(name for name in self.names if name != node)

    def config(self, node: str) -> dict[str, Any]:
        """What *node* is declared to be, as a phalanx.toml would say it."""
        addresses = [{"address": f"{self.vip}/24", **self._vip}]
        if self.vip6:
            addresses.append({"address": f"{self.vip6}/64", **self._vip})
        nats = self.lab[len(self.names) + 1].address
        return {
            "platform": {"name": "test"},
            "nats": {"urls": [f"nats://{nats}:{_NATS_PORT}"]},
            "timings": {"ttl": self._ttl},
            "http": {"host": "127.0.0.1", "port": _HTTP_PORT},
            **self._platform,
            "apps": {
                APP: {
                    "pattern": {"type": "active-passive"},
                    "backend": {
                        "type": "process",
                        "command": [sys.executable, "-I", str(WEB), str(PORT), str(self._start_seconds)],
                        "ready": {"type": "tcp", "address": f"127.0.0.1:{PORT}"},
                    },
                    "vip": addresses,
                    **self._app,
                }
            },
        }

    # --- what is so

    def ask(self, address: str = "", path: str = "/", timeout: float = 0.25) -> Answer:
        """Who answers the client at the address (*address*: that one)."""
        status, body = self.client.get(address or self.vip, PORT, path, timeout)
        if status != 200:
            return Answer()
        node, _, epoch = body.decode().partition(" ")
        return Answer(node, int(epoch))

    def holders(self, address: str = "") -> list[str]:
        """The nodes on whose hosts the address is."""
        return [node for node in self.names if (address or self.vip) in self.host(node).addresses()]

    def status(self, node: str) -> dict[str, Any]:
        """The app on *node*, by its /status; empty where nobody answers."""
        code, body = self.host(node).get("127.0.0.1", _HTTP_PORT, "/status", 1.0)
        apps: list[dict[str, Any]] = json.loads(body)["apps"] if code == 200 else []
        return next((app for app in apps if app["name"] == APP), cast("dict[str, Any]", {}))

    def role(self, node: str) -> str:
        """The role of *node* for the app; empty where it does not answer."""
        return str(self.status(node).get("role", ""))

    def settled(self, timeout: float = 60.0) -> str:
        """Wait until one node is active, answers, and all others are standbys: the active one."""
        active = self.wait_for_active(timeout=timeout)
        others = [node for node in self.names if node != active]
        for node in others:
            self.wait_until(lambda node=node: self.role(node) == "standby", f"{node} is no standby", timeout)
        return active

    def wait_for_active(self, *, other_than: str = "", timeout: float = 30.0) -> str:
        """Wait until a node (*other_than* that one) is active and answers at the address: its id."""

        def found() -> str:
            answer = self.ask()
            is_other = answer.node and answer.node != other_than
            return answer.node if is_other and self.role(answer.node) == "active" else ""

        return self.wait_until(found, "no node is active and answers", timeout)

    def wait_until(self, condition: Callable[[], T], problem: str, timeout: float = 20.0) -> T:
        """Ask until *condition* is true; its value. Raises TimeoutError with the nodes' logs."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout:g} s: {problem}\n{self.logs()}")
            time.sleep(_POLL_SECONDS)
        return value

    def logs(self) -> str:
        """What the nodes have logged."""
        return "\n".join(f"--- {name}\n{node.log()[-4000:]}" for name, node in self.nodes.items())

    # --- lifetime

    def start(self) -> None:
        """Make the hosts, start the NATS server and, unless told otherwise, the nodes."""
        self.lab.start()
        nats = self.lab[len(self.names) + 1]
        command = [nats_server_binary(), "-js", "-a", nats.address, "-p", str(_NATS_PORT)]
        with (self.directory / "nats.log").open("ab") as log:
            nats.popen([*command, "-sd", str(self.directory / "nats")], stdout=log, stderr=log)
        for node in self.names:
            path = self.directory / f"{node}.toml"
            path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in self.config(node).items()))
            program = [sys.executable, "-c", _NODE, str(path)]
            self.nodes[node] = NodeProcess(
                self.host(node).command(*program), node, self.directory / node, _HTTP_PORT, {}
            )
        self.client.call(_wait_listening, nats.address, _NATS_PORT)
        if self._start:
            for node in self.nodes.values():
                node.start()

    def close(self) -> None:
        """End everything and delete the files."""
        for node in self.nodes.values():
            node.stop()
        self.lab.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_NODE = """
import sys
from phalanx import Platform
from phalanx.config import load_toml
Platform.from_config(*load_toml(sys.argv[1])).run()
"""


def _toml(value: object) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in table.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in cast('list[object]', value))}]"
    return json.dumps(value)


def _wait_listening(address: str, port: int) -> None:
    import socket

    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection((address, port), 0.5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
