"""What a client sees of a process or a container whose node restarts in a pause: nothing, if it runs on."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.figures import Run
from phalanx import NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.keeper import note
from phalanx.testing.dockerd import DockerDaemon
from phalanx.testing.nats import HOST, NatsServer, Ports
from phalanx.testing.nodes import NodeProcess, Nodes

AWAY_SECONDS = 3.0
"""Between the node's end and its next start: longer than its session lasts without renewals."""

_TTL_SECONDS = 2.0
_REQUEST_SECONDS = 1.0
_POLL_SECONDS = 0.003


async def process(run: Run) -> None:
    """Failed requests during a restart of the node, by SIGTERM and by SIGKILL in turn: of a process."""
    await _adopt(run, 'type = "process"\n')


async def container(run: Run) -> None:
    """The same of a container."""
    with DockerDaemon() as dockerd:
        await _adopt(
            run,
            f'type = "docker"\nimage = "{dockerd.busybox_image()}"\nnetwork = "host"\n'
            f'socket = "{dockerd.socket}"\n',
        )


async def _adopt(run: Run, backend: str) -> None:
    ports = Ports()
    address = f"{HOST}:{ports.take()}"
    try:
        with (
            NatsServer() as nats,
            tempfile.TemporaryDirectory(prefix="phalanx-adopt-") as folder,
        ):
            toml = Path(folder) / "phalanx.toml"
            toml.write_text(_toml(backend, address))
            command = [sys.executable, "-m", "phalanx.cli.main", "run", str(toml)]
            with Nodes(command, nats.urls, count=2) as nodes:
                async with PlatformClient("bench", NatsOptions(urls=tuple(nats.urls))) as client:
                    await _measure(run, nodes, client, f"http://{address}/")
    finally:
        ports.close()


def _toml(backend: str, address: str) -> str:
    return (
        f'[platform]\nname = "bench"\n[timings]\nttl = "{_TTL_SECONDS}s"\n'
        f'[apps.wiki]\npattern = "active-passive"\n[apps.wiki.backend]\n{backend}'
        f'command = ["busybox", "httpd", "-f", "-p", "{address}"]\n'
    )


async def _measure(run: Run, nodes: Nodes, client: PlatformClient, url: str) -> None:
    active = await nodes.wait_for_active("wiki")
    await nodes.wait_for_standbys("wiki", 1)
    await client.pause("wiki")
    node = nodes[active]
    await nodes.wait_until(lambda: note.read(node.data_dir), 10, "its keeper does not know of the pause")
    epoch = node.status()["apps"][0]["epoch"]
    for number in range(run.runs):
        how = "SIGKILL" if number % 2 else "SIGTERM"
        with Poller(url) as poller:
            seconds = await _restart(node, nodes, kill=bool(number % 2))
        if node.status()["apps"][0]["epoch"] != epoch:
            run.problems.append("it began anew, under another epoch")
        text = f"{how}: {poller.failed} of {poller.asked} failed, slowest {1000 * poller.slowest:.1f} ms"
        run.add(poller.failed, f"{text}; active again {seconds:.2f} s after its start")
    await client.resume("wiki")


async def _restart(node: NodeProcess, nodes: Nodes, *, kill: bool) -> float:
    """Seconds from its next life's start until that has taken its program up."""
    if kill:
        node.kill()
    else:
        node.terminate()
        await asyncio.to_thread(node.wait)
    await asyncio.sleep(AWAY_SECONDS)
    began = system.now()
    node.start()
    await nodes.wait_for_active("wiki")
    return system.now() - began


class Poller:
    """A client that asks every few milliseconds, each time on a new connection. Any HTTP answer is one."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.asked = self.failed = 0
        self.slowest = 0.0
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                urllib.request.urlopen(self._url, timeout=_REQUEST_SECONDS).close()
            except urllib.error.HTTPError as error:
                error.close()  # there is no page: it has answered
            except OSError:
                self.failed += 1
            self.asked += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            self._stop.wait(_POLL_SECONDS)
