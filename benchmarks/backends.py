"""What Phalanx adds to the start of a program: registration, start and ready check, against a bare start.

The program is the same everywhere: busybox's HTTP server, which listens some milliseconds after its exec. A
bare start does what one would do by hand: spawn it, or ask the engine for it, and connect until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from benchmarks.figures import Run
from phalanx import config, system
from phalanx.backends import Holder, make_backend
from phalanx.backends.engine import Engine
from phalanx.keeper.fencing import Registry
from phalanx.ports import SectionContext
from phalanx.testing.dockerd import DockerDaemon
from phalanx.testing.nats import HOST, Ports
from phalanx.types import Resource

READY_TIMEOUT = 30.0

_POLL_SECONDS = 0.002

Bare = Callable[[list[str]], contextlib.AbstractAsyncContextManager[None]]


async def process(run: Run) -> None:
    """A process: the time added to start and ready, in ms."""

    def declare(command: list[str]) -> config.Backend:
        return config.Process(command, ready=_check(command), ready_timeout=READY_TIMEOUT)

    await measure(run, declare, _bare_process, holds=True)


async def container(run: Run) -> None:
    """A container: the same, in ms."""
    with DockerDaemon() as dockerd:
        image = dockerd.busybox_image()

        def declare(command: list[str]) -> config.Backend:
            return config.Docker(
                image=image,
                command=command,
                network="host",  # docker-proxy would answer before the program does
                socket=dockerd.socket,
                ready=_check(command),
                ready_timeout=READY_TIMEOUT,
            )

        await measure(run, declare, lambda command: _bare_container(dockerd.socket, image, command))


def _check(command: list[str]) -> config.TcpCheck:
    return config.TcpCheck(command[-1], interval=0.1, timeout=1.0)


async def measure(
    run: Run, declare: Callable[[list[str]], config.Backend], bare: Bare, *, holds: bool = False
) -> None:
    """Each run starts the program once bare and once by Phalanx, in turn: the difference counts.

    *holds*: with the holder of processes, which a node has from its own start on.
    """
    ports = Ports()
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="phalanx-overhead-"))
        holder = await stack.enter_async_context(Holder(Path(folder))) if holds else None
        registry = Registry(Path(folder))

        async def register(resource: Resource) -> None:
            await asyncio.to_thread(registry.add, resource)

        for epoch in range(1, run.runs + 1):
            command = ["busybox", "httpd", "-f", "-p", f"{HOST}:{ports.take()}"]
            began = system.now()
            async with bare(command):
                await _answers(command[-1])
                by_hand = system.now() - began
            section = SectionContext("bench", "n1", "wiki", epoch, register, registry.remove)
            backend = make_backend(declare(command), "bench", "n1", holder)
            began = system.now()
            running = await backend.start(section)
            await running.wait_ready()
            took = system.now() - began
            await running.kill()
            run.add(1000 * (took - by_hand), f"{1000 * took:.1f} ms, by hand {1000 * by_hand:.1f} ms")
    ports.close()


async def _answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(READY_TIMEOUT):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                return
            await asyncio.sleep(_POLL_SECONDS)


@contextlib.asynccontextmanager
async def _bare_process(command: list[str]) -> AsyncGenerator[None]:
    started = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        started.kill()
        await started.wait()


@contextlib.asynccontextmanager
async def _bare_container(socket: str, image: str, command: list[str]) -> AsyncGenerator[None]:
    async with Engine(socket) as engine:
        body = {"Image": image, "Cmd": command, "HostConfig": {"NetworkMode": "host"}}
        made = await engine.create("bare", body)
        try:
            await engine.start(made)
            yield
        finally:
            await engine.remove(made)
