"""A real HAProxy follows the active node, by nothing but the status codes of the nodes' HTTP servers.

Its configuration is the one of docs/haproxy.md, with other addresses.
"""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

from phalanx import system
from phalanx.testing.nats import HOST, NatsCluster, Ports
from phalanx.testing.nodes import Nodes

DOC = Path(__file__).parents[2] / "docs" / "haproxy.md"
APP = "wiki"

NODE_PROGRAM = f"""
import os, sys
from phalanx import ActivePassive, HttpCheck, Platform, Process

port, www = os.environ["WIKI_PORT"], os.environ["WIKI_FILES"]
platform = Platform("test", timings={{"ttl": 2}})
platform.app(
    "{APP}",
    ActivePassive(),
    backend=Process(
        (sys.executable, "-m", "http.server", port, "--bind", "{HOST}", "--directory", www),
        ready=HttpCheck(url=f"http://{HOST}:{{port}}/node.txt"),
    ),
)
platform.run()
"""


class Answer(NamedTuple):
    """One request through HAProxy. ``node``: who answered; empty if nobody did."""

    at: float
    node: str


class Client:
    """Asks through HAProxy every 10 ms, on a new connection each time."""

    def __init__(self, port: int) -> None:
        self.port, self.answers = port, list[Answer]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            connection = http.client.HTTPConnection(HOST, self.port, timeout=1)
            node = ""
            try:
                connection.request("GET", "/node.txt")
                response = connection.getresponse()
                body = response.read().decode()
                node = body if response.status == 200 else ""
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            self.answers.append(Answer(system.now(), node))

    @property
    def latest(self) -> str:
        """Who answered last; empty if nobody did."""
        return self.answers[-1].node if self.answers else ""

    def seen(self) -> list[str]:
        """The nodes that answered, one after the other, each run of answers once."""
        return [node for node, _ in groupby(answer.node for answer in self.answers if answer.node)]

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)


class HAProxy:
    """The process, and what its own statistics say of the servers."""

    def __init__(self, socket_path: Path, port: int) -> None:
        self._socket_path, self.port = socket_path, port

    def listens(self) -> bool:
        """Whether it runs already."""
        with socket.socket(socket.AF_UNIX) as channel:
            try:
                channel.connect(str(self._socket_path))
            except OSError:
                return False
        return True

    def up(self) -> list[str]:
        """The servers of the backend that HAProxy sends requests to."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(10)
            channel.connect(str(self._socket_path))
            channel.sendall(b"show stat\n")
            text = b"".join(iter(lambda: channel.recv(65536), b"")).decode()
        rows = [line.split(",") for line in text.splitlines() if line.startswith(f"{APP},n")]
        return [row[1] for row in rows if row[17] == "UP"]


def configuration(port: int, stats: Path, servers: dict[str, tuple[int, int]]) -> str:
    """The documented one. *servers*: service port and HTTP port of each node."""
    found = re.search(r"```haproxy\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    text = found[1].replace("bind :80", f"bind {HOST}:{port}").replace("inter 500ms", "inter 100ms")
    for name, (service, checked) in servers.items():
        text, count = re.subn(
            rf"server {name} \S+ check port \d+", f"server {name} {HOST}:{service} check port {checked}", text
        )
        assert count == 1, f"docs/haproxy.md has no server {name}"
    return text.replace("global\n", f"global\n    stats socket {stats} mode 600\n")


@contextmanager
def haproxy(directory: Path, port: int, servers: dict[str, tuple[int, int]]) -> Generator[HAProxy]:
    """HAProxy in the foreground of a process of its own."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/bin")
    if program is None:
        pytest.fail("this test needs HAProxy: apt-get install haproxy")
    stats, path, log = directory / "stats", directory / "haproxy.cfg", directory / "haproxy.log"
    path.write_text(configuration(port, stats, servers))
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-db", "-f", str(path)], stdout=output, stderr=output)
    try:
        proxy = HAProxy(stats, port)
        wait_until(lambda: proxy.listens() or process.poll() is not None, "HAProxy does not start")
        assert process.poll() is None, log.read_text()
        yield proxy
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait(10)


def wait_until(condition: Callable[[], bool], problem: str, seconds: float = 20.0) -> None:
    """Ask every 5 ms until it is so. Fails after *seconds*."""
    deadline = system.now() + seconds
    pause = threading.Event()
    while not condition():
        assert system.now() < deadline, problem
        pause.wait(0.005)


def test_haproxy_routes_to_the_active_node_and_to_no_other(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """Through a crash and a hand-over clients reach the active node's program, never one of another node."""
    ports = Ports()
    service = [ports.take() for _ in range(3)]
    program = tmp_path / "node.py"
    program.write_text(NODE_PROGRAM)

    def env_of(i: int) -> dict[str, str]:
        www = tmp_path / f"www{i}"
        www.mkdir()
        (www / "node.txt").write_text(f"n{i + 1}")
        return {"WIKI_PORT": str(service[i]), "WIKI_FILES": str(www)}

    try:
        with Nodes((sys.executable, str(program)), nats_cluster.urls, env_of=env_of) as nodes:
            servers = {node.node: (service[i], node.http_port) for i, node in enumerate(nodes)}
            with haproxy(tmp_path, ports.take(), servers) as proxy, Client(proxy.port) as client:
                _crash_and_hand_over(nodes, proxy, client)
    finally:
        ports.close()


def _crash_and_hand_over(nodes: Nodes, proxy: HAProxy, client: Client) -> None:
    wait_until(lambda: client.latest != "", "nobody is served")
    first = client.latest
    assert nodes.actives(APP) == [first]
    wait_until(lambda: sum(node.is_standby(APP) for node in nodes) == 2, "no standbys")
    assert proxy.up() == [first]

    killed = system.now()
    nodes[first].kill()
    wait_until(lambda: client.latest not in ("", first), "the crash moved no client")
    second = client.latest
    # A crash costs half a second, the next check 0.1 s, and the program starts within the rest.
    assert system.now() - killed < 5
    assert nodes.actives(APP) == [second]
    assert proxy.up() == [second]

    nodes[second].terminate()
    wait_until(lambda: client.latest not in ("", second), "the hand-over moved no client")
    third = client.latest
    assert nodes[second].wait(10) == 0
    assert nodes.actives(APP) == [third]
    assert proxy.up() == [third]
    # Nobody was sent back and forth: each node answered for one while, and never again.
    assert client.seen() == [first, second, third]
    assert len({first, second, third}) == 3


def test_haproxy_answers_by_itself_while_no_node_is_there(tmp_path: Path) -> None:
    """Three nodes that do not answer their check: clients get 503 at once, nobody hangs."""
    ports = Ports()
    try:
        servers = {name: (ports.take(), ports.take()) for name in ("n1", "n2", "n3")}
        with haproxy(tmp_path, ports.take(), servers) as proxy:
            wait_until(lambda: proxy.up() == [], "servers that do not answer their check are up")
            connection = http.client.HTTPConnection(HOST, proxy.port, timeout=2)
            connection.request("GET", "/")
            assert connection.getresponse().status == 503
            connection.close()
    finally:
        ports.close()
