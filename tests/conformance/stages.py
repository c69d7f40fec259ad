"""The backends under test: how each runs a ``Behaviour``, and what of it still runs.

A new backend is a class here (or in a module of its own) and one more entry in ``BACKENDS``. Those that run
real programs derive from :class:`RealStage`, whose program is ``program.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
from _pytest.mark import ParameterSet
from tests.waiting import until

from phalanx import cgroup_v2, config, system
from phalanx.backends import Holder, make_backend
from phalanx.keeper import note
from phalanx.keeper.fencing import kill_resources
from phalanx.ports import Backend, SectionContext
from phalanx.testing.fake_backend import Behaviour, FakeBackend, FakeHost
from phalanx.testing.holders import holder_of
from phalanx.types import Resource, SessionId

PROGRAM = Path(__file__).with_name("program.py")
READY_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0


def app_of(folder: Path) -> str:
    """The name of the app whose witness is *folder*."""
    return f"wiki-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


class Stage(Protocol):
    """One backend under test."""

    app: str
    """Of this stage alone: other tests that run at the same time are not in its way."""
    kind: str
    """Of the resources that it registers."""

    def backend(
        self,
        behaviour: Behaviour,
        *,
        ready: bool = False,
        ready_timeout: float = READY_TIMEOUT,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> Backend:
        """A backend whose program behaves so. *ready*: with a check, which passes once it said ``ready``."""
        ...

    def has_said(self, word: str) -> bool:
        """Whether a program has come to that: ``started``, ``ready``, ``daemon``, ``bye``."""
        ...

    def left(self) -> list[str]:
        """What still runs of all that was ever started here."""
        ...

    def crash(self) -> None:
        """End the program itself from outside, as a crash does, and nothing else of it."""
        ...

    async def node_dies(self, behaviour: Behaviour, at: int) -> list[Resource]:
        """A node starts the program and is killed: during its registration *at* (1 …), or 0: once the program
        has said ``started``. What the keeper knew by then."""
        ...

    async def keeper_kills(self, resources: list[Resource]) -> bool:
        """What the keeper does with that; whether all of it is gone."""
        ...

    async def lose(self) -> None:
        """After the node's death: whoever else would end what runs, dies as well."""
        ...

    async def close(self) -> None:
        """End whatever a failed test has left."""
        ...


class RealStage:
    """A stage whose programs are real: ``program.py`` with *folder* as witness."""

    name: str
    """Its key in ``BACKENDS``."""
    kind: str

    def __init__(self, folder: Path) -> None:
        self.folder, self.app = folder, app_of(folder)
        self._nodes: list[asyncio.subprocess.Process] = []
        self._registered: list[Resource] = []

    def command(self, behaviour: Behaviour) -> list[str]:
        """The command line of the program."""
        return [sys.executable, "-u", str(PROGRAM), str(self.folder), msgspec.json.encode(behaviour).decode()]

    def check(self) -> config.FunctionCheck:
        """Passes once the program has said that it is ready."""
        return config.FunctionCheck((self.folder / "ready").exists, interval=0.05, timeout=0.5)

    def declare(self, behaviour: Behaviour, **options: object) -> config.Backend:
        """How a user would declare it. *options*: ready, ready_timeout, stop_timeout."""
        raise NotImplementedError

    def backend(
        self,
        behaviour: Behaviour,
        *,
        ready: bool = False,
        ready_timeout: float = READY_TIMEOUT,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> Backend:
        """See ``Stage.backend``."""
        declared = self.declare(
            behaviour,
            ready=self.check() if ready else None,
            ready_timeout=ready_timeout,
            stop_timeout=stop_timeout,
        )
        app = config.build_app(self.app, config.ActivePassive(), backend=declared)
        assert app.backend is not None
        return self.backend_of(app.backend)

    def backend_of(self, declared: config.Backend) -> Backend:
        """The adapter for it."""
        return make_backend(declared, "prod", "n1")

    def has_said(self, word: str) -> bool:
        """See ``Stage.has_said``."""
        return (self.folder / word).exists()

    def left(self) -> list[str]:
        """See ``Stage.left``."""
        raise NotImplementedError

    def crash(self) -> None:
        """See ``Stage.crash``."""
        os.kill(int((self.folder / "program.pid").read_text()), 9)

    async def node_dies(self, behaviour: Behaviour, at: int) -> list[Resource]:
        """See ``Stage.node_dies``."""
        node = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.conformance.node", self.name, str(self.folder),
            msgspec.json.encode(behaviour).decode(), str(at),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._nodes.append(node)
        assert node.stdout is not None
        known: dict[str, Resource] = {}
        async with asyncio.timeout(30):
            while (line := await node.stdout.readline()) != b"now\n":
                assert line, "the node has ended by itself"
                resource = msgspec.json.decode(line, type=Resource)
                known[resource.id] = resource
        node.kill()
        await node.wait()
        self._registered += known.values()
        return list(known.values())

    async def keeper_kills(self, resources: list[Resource]) -> bool:
        """See ``Stage.keeper_kills``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                while not await kill_resources(resources):
                    pass
                return True
        return False

    async def lose(self) -> None:
        """See ``Stage.lose``: nobody would."""

    async def close(self) -> None:
        """See ``Stage.close``."""
        for node in self._nodes:
            with contextlib.suppress(ProcessLookupError):
                node.kill()
            await node.wait()
        await self.keeper_kills(self._registered)


class HostStage(RealStage):
    """A stage whose programs are processes that this one can see."""

    def left(self) -> list[str]:
        """See ``Stage.left``: found by the folder in their command lines, which forks inherit."""
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        return [
            f"process {pid}"
            for pid in pids
            if str(PROGRAM) in (line := system.command_line(pid))
            and str(self.folder) in line
            and system.is_running(pid)
        ]

    async def close(self) -> None:
        """See ``Stage.close``."""
        await super().close()
        for what in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(what.split()[1]), 9)


class ProcessStage(HostStage):
    """``phalanx.Process``. Its parent is a holder, which a pause leaves to the next life of the node."""

    name = kind = "process"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._holder = Holder(folder)

    def backend_of(self, declared: config.Backend) -> Backend:
        """See ``RealStage.backend_of``."""
        return make_backend(declared, "prod", "n1", self._holder)

    async def node_dies(self, behaviour: Behaviour, at: int) -> list[Resource]:
        """See ``Stage.node_dies``: in a pause, and the keeper that outlives it is whoever runs the test."""
        note.write(self.folder, SessionId("n1", "ab"))
        return await super().node_dies(behaviour, at)

    async def lose(self) -> None:
        """See ``Stage.lose``: the holder would end it. Its locks are there until it is gone."""
        holder = system.ProcessRef.of(holder_of(self.folder))
        assert holder.pid
        os.kill(holder.pid, 9)
        await until(lambda: not holder.alive())

    async def close(self) -> None:
        """See ``Stage.close``."""
        note.remove(self.folder)
        await self._holder.close()
        await super().close()

    def declare(self, behaviour: Behaviour, **options: object) -> config.Process:
        """See ``RealStage.declare``."""
        command = ["/no/such/program"] if behaviour.missing else self.command(behaviour)
        return config.Process(command, **options)  # pyright: ignore


class FakeStage:
    """``phalanx.testing.fake_backend``."""

    kind = "fake"

    def __init__(self, folder: Path) -> None:
        self.host, self.app = FakeHost(), app_of(folder)

    def backend(
        self,
        behaviour: Behaviour,
        *,
        ready: bool = False,
        ready_timeout: float = READY_TIMEOUT,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> FakeBackend:
        """See ``Stage.backend``."""
        return FakeBackend(
            behaviour, self.host, waits_ready=ready, ready_timeout=ready_timeout, stop_timeout=stop_timeout
        )

    def has_said(self, word: str) -> bool:
        """See ``Stage.has_said``."""
        return (self.app, word) in self.host.said

    def left(self) -> list[str]:
        """See ``Stage.left``."""
        return list(self.host.programs)

    def crash(self) -> None:
        """See ``Stage.crash``."""
        for program in list(self.host.programs.values()):
            program.kill_program()

    async def node_dies(self, behaviour: Behaviour, at: int) -> list[Resource]:
        """See ``Stage.node_dies``."""
        backend, known, reached = self.backend(behaviour), dict[str, Resource](), asyncio.Event()

        async def register(resource: Resource) -> None:
            known[resource.id] = resource
            if at:
                reached.set()
                await asyncio.Event().wait()

        section = SectionContext("prod", "n1", self.app, 6, register, lambda resource_id: None)
        start = asyncio.create_task(backend.start(section))
        await asyncio.wait(
            {start, waits := asyncio.create_task(reached.wait())}, return_when="FIRST_COMPLETED"
        )
        backend.die()
        start.cancel()
        waits.cancel()
        await asyncio.gather(start, waits, return_exceptions=True)
        return list(known.values())

    async def keeper_kills(self, resources: list[Resource]) -> bool:
        """See ``Stage.keeper_kills``."""
        for resource in resources:
            self.host.kill(resource.id)
        return True

    async def lose(self) -> None:
        """See ``Stage.lose``: nobody would."""

    async def close(self) -> None:
        """See ``Stage.close``."""
        for marker in self.left():
            self.host.kill(marker)


def _systemd(folder: Path) -> Stage:
    from .systemd_stage import SystemdStage

    return SystemdStage(folder)


def _docker(folder: Path) -> Stage:
    from .docker_stage import DockerStage

    return DockerStage(folder)


BACKENDS: dict[str, Callable[[Path], Stage]] = {
    "process": ProcessStage,
    "docker": _docker,
    "systemd": _systemd,
    "fake": FakeStage,
}
"""By name. What makes one may call ``pytest.skip`` where this host can't run it."""

REGISTRATIONS = {"process": 2, "docker": 1, "systemd": 1, "fake": 1}
"""How many times a start registers before the program runs. It may do so again, once it runs."""

FENCING = [name for name in BACKENDS if name != "process" or cgroup_v2.base()]
"""Those whose ``fence`` finds by itself what a dead node has left. Without control groups only the keeper's
list tells of processes."""


def param(name: str, *values: object) -> ParameterSet:
    """One case of a test: that backend, and *values*."""
    return pytest.param(name, *values, marks=[pytest.mark.in_systemd] if name == "systemd" else [])
