"""A backend that runs nothing: programs in memory, for tests of what Phalanx makes of their behaviour.

It passes the same conformance suite as the real ones (``tests/conformance``), and needs nothing but an
event loop: virtual time will do (``phalanx.testing.virtual_time``). ::

    host = FakeHost()
    backend = FakeBackend(Behaviour(ready_seconds=2.0, ends_seconds=10.0, exit_code=1), host)
    running = await backend.start(section)
    await running.wait_ready()
    assert host.programs  # what runs, as ps would show it
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import ProgramState, ProgramStatus, Resource

LINES_KEPT = 1000
"""How many of the last lines of a program :meth:`FakeBackend.logs` knows."""


class Behaviour(msgspec.Struct, frozen=True):
    """What a program does. All times are seconds from its start, those of the end from the signal to stop.

    ``ready_seconds``: when it serves; None: never. ``ends_seconds``: when it ends by itself, with
    ``exit_code``; None: never. ``stop_seconds``: how long it takes to end once asked; None: it ignores that.
    ``daemon``: it leaves a child with a session of its own. ``lines``: what it prints at first.
    ``floods``: and then it prints without end. ``missing``: there is no such program.
    """

    ready_seconds: float | None = 0.0
    ends_seconds: float | None = None
    exit_code: int = 0
    stop_seconds: float | None = 0.0
    daemon: bool = False
    lines: tuple[str, ...] = ()
    floods: bool = False
    missing: bool = False


class FakeProgram:
    """A program that "runs". ``said``: what it has come to: ``started``, ``ready``, ``bye``, ``daemon``."""

    def __init__(self, host: FakeHost, app: str, marker: str, behaviour: Behaviour) -> None:
        self._host, self.app, self.marker, self.behaviour = host, app, marker, behaviour
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self.parts = {"program", "daemon"} if behaviour.daemon else {"program"}
        self.lines: deque[str] = deque(behaviour.lines, LINES_KEPT)
        self.since = system.wall()
        self.ready, self.exited = asyncio.Event(), asyncio.Event()
        self.how = ""
        self._say("started")
        if behaviour.daemon:
            self._say("daemon")
        if behaviour.ready_seconds is not None:
            self._after(behaviour.ready_seconds, self._become_ready)
        if behaviour.ends_seconds is not None:
            self._after(behaviour.ends_seconds, self._end_by_itself)
        if behaviour.floods:
            self._print()

    @property
    def lives(self) -> bool:
        """Whether the program itself runs; its daemon may without it."""
        return "program" in self.parts

    def stop(self) -> None:
        """Ask it to end."""
        if self.lives and self.behaviour.stop_seconds is not None:
            self._after(self.behaviour.stop_seconds, self._obey)

    def kill(self) -> None:
        """End all of it, at once."""
        self._end("killed by SIGKILL")
        self.parts.clear()
        self._host.programs.pop(self.marker, None)

    def kill_program(self) -> None:
        """End the program, and leave what it has started: a crash."""
        self._end("killed by SIGKILL")

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(seconds, act))

    def _say(self, word: str) -> None:
        self._host.said.append((self.app, word))

    def _become_ready(self) -> None:
        self.ready.set()
        self._say("ready")

    def _print(self) -> None:
        self.lines.extend(["y"] * 100)
        self._after(0.01, self._print)

    def _obey(self) -> None:
        self._say("bye")
        self._end("exited with code 0")

    def _end_by_itself(self) -> None:
        self._end(f"exited with code {self.behaviour.exit_code}")

    def _end(self, how: str) -> None:
        if not self.lives:
            return
        for timer in self._timers:
            timer.cancel()
        self.how = how
        self.parts.discard("program")
        self.exited.set()


class FakeHost:
    """What runs on one host: it outlives the backends that have started it, as the host outlives a node."""

    def __init__(self) -> None:
        self.programs: dict[str, FakeProgram] = {}
        """What runs, by marker: programs, and those that have left a daemon."""
        self.said: list[tuple[str, str]] = []
        """What programs have come to, by app: see :class:`FakeProgram`."""
        self.held: dict[str, FakeBackend] = {}
        """Which backend, of a node that lives, holds the program of a marker."""

    def kill(self, marker: str) -> None:
        """What a keeper does: end all of one start. Harmless if nothing of it runs."""
        if program := self.programs.get(marker):
            program.kill()


class FakeBackend:
    """Implements ``ports.Backend`` without a program: what *behaviour* says happens, on *host*.

    *waits_ready*: whether there is a ready check. The other options are those of ``phalanx.Process``.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        behaviour: Behaviour,
        host: FakeHost | None = None,
        *,
        waits_ready: bool = True,
        ready_timeout: float = 30.0,
        stop_timeout: float = 10.0,
    ) -> None:
        self.behaviour, self.host = behaviour, host or FakeHost()
        self.waits_ready, self.ready_timeout, self.stop_timeout = waits_ready, ready_timeout, stop_timeout
        self.node_lives = True
        """Set to false this is the backend of a node that was killed: it does nothing any more."""
        self._last: FakeProgram | None = None

    async def prepare(self, app: str) -> None:
        """See ``ports.Backend.prepare``."""
        if self.behaviour.missing:
            raise BackendError(app, "prepare", "there is no such program", "leave out missing=True")

    async def start(self, section: SectionContext) -> Running:
        """See ``ports.Backend.start``."""
        await self.prepare(section.app)
        await self.fence(section.app)
        marker = f"{section.app}.{section.epoch}.{next(self._numbers)}"
        resource = Resource("fake", marker, section.app, section.epoch, adoptable=True)
        try:
            await section.register(resource)
        except BaseException:
            if self.node_lives:
                section.unregister(marker)
            raise
        program = FakeProgram(self.host, section.app, marker, self.behaviour)
        self.host.programs[marker] = self._last = program
        return FakeRun(self, section, program)

    async def fence(self, app: str) -> list[str]:
        """See ``ports.Backend.fence``: here all of *app* that runs without a :class:`FakeRun`."""
        left = [
            program
            for program in self.host.programs.values()
            if program.app == app and program.marker not in self.host.held
        ]
        for program in left:
            program.kill()
        return [f"program {program.marker}" for program in left]

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """See ``ports.Backend.adopt``."""
        program = self.host.programs.get(resource.id)
        if program is None or not program.lives:
            return None
        await section.register(resource)
        self._last = program
        return FakeRun(self, section, program)

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """See ``ports.Backend.logs``."""
        return list(self._last.lines)[-lines:] if self._last is not None else []

    def die(self) -> None:
        """The node of this backend was killed: programs run on, and nobody holds them."""
        self.node_lives = False
        for marker in [marker for marker, backend in self.host.held.items() if backend is self]:
            del self.host.held[marker]


class FakeRun:
    """Implements ``ports.Running``."""

    def __init__(self, backend: FakeBackend, section: SectionContext, program: FakeProgram) -> None:
        self._backend, self._section, self.program = backend, section, program
        self._asked_to_end = False
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watching = asyncio.create_task(self._watch(), name=f"watch {program.marker}")
        self._registered = True
        backend.host.held[program.marker] = backend

    async def _watch(self) -> None:
        await self.program.exited.wait()
        if not self._asked_to_end:
            self._ended.set_result(self.program.how)

    @property
    def ended(self) -> asyncio.Future[str]:
        """See ``ports.Running.ended``."""
        return asyncio.shield(self._ended)

    def status(self) -> ProgramStatus:
        """See ``ports.Running.status``."""
        if not self.program.lives:
            state = ProgramState.ENDED
        else:
            state = ProgramState.STOPPING if self._asked_to_end else ProgramState.RUNNING
        return ProgramStatus(f"program {self.program.marker}", state, self.program.since)

    async def wait_ready(self) -> None:
        """See ``ports.Running.wait_ready``."""
        app = self.program.app
        if not self._backend.waits_ready:
            return
        waits = [asyncio.create_task(event.wait()) for event in (self.program.ready, self.program.exited)]
        try:
            await asyncio.wait(
                waits, timeout=self._backend.ready_timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if not self.program.lives:
            raise BackendError(app, "ready", f"the program {self.program.how} before it was ready")
        if not self.program.ready.is_set():
            raise BackendError(app, "ready", f"not ready within {self._backend.ready_timeout:g} s")

    async def stop(self, reason: str) -> None:
        """See ``ports.Running.stop``."""
        if self.program.lives:
            if not self._asked_to_end:
                self._asked_to_end = True
                self.program.stop()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backend.stop_timeout):
                    await self.program.exited.wait()
        await self.kill()

    async def kill(self) -> None:
        """See ``ports.Running.kill``."""
        self._asked_to_end = True
        self.program.kill()
        self._backend.host.held.pop(self.program.marker, None)
        if not self._ended.done():
            self._watching.cancel()
        if self._registered:
            self._registered = False
            self._section.unregister(self.program.marker)
        await asyncio.sleep(0)
