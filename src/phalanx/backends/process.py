"""A program as backend: in a session of its own, known to the keeper before it runs, all of it gone after.

The invariant: from before the spawn until nothing of it runs, the keeper has the marker by which every
process of the section can be found and killed. It is taken back only after a scan that found nobody. The
program itself runs only once the keeper has its group as well: until then it waits behind a gate.

Where there is cgroup v2, and the node may use it, the program is in a control group of its own before it
runs: nothing it starts can leave that, and the kernel kills it as one. The search for the marker goes on all
the same: a session manager (pam_systemd, by sudo or su) may have moved something elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from phalanx import cgroup_v2, child, system
from phalanx.backends import gate, limits, readiness
from phalanx.backends.abandoning import until_gone
from phalanx.backends.launch import Launch, prepare, spawn_failed
from phalanx.config import Check, Process
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import ProgramState, ProgramStatus, Resource

log = logging.getLogger("phalanx.backend")

KILL_DEADLINE_SECONDS = 2.0
LINES_KEPT = 1000
"""How many of the last lines of its programs a backend knows (of 4 KiB at most, ``child.MAX_LINE_BYTES``)."""

_GROUP_POLL_SECONDS = 0.03


class ProcessBackend:
    """Implements ``ports.Backend`` for :class:`phalanx.config.Process`."""

    def __init__(self, config: Process) -> None:
        self._config = config
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)

    async def prepare(self, app: str) -> None:
        """See ``ports.Backend.prepare``."""
        await child.in_thread(partial(prepare, self._config, app))

    async def fence(self, app: str) -> list[str]:
        """Kill what is in control groups of *app* that nobody holds any more.

        Without cgroups there is nothing to do: the keeper's file has what an earlier life left.
        """
        return await child.in_thread(partial(_fence, app, f"{app}."))

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """The kernel ends a process with its node: there is never one to take up."""
        return None

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """See ``ports.Backend.logs``. The last ``LINES_KEPT`` of this life of the node, of all its starts."""
        return list(self._kept)[-lines:]

    async def start(self, section: SectionContext) -> Running:
        """Register, spawn, register with the group. See ``ports.Backend.start``.

        On a failure or cancellation it returns only when nothing is left, however long processes take to
        die: the section takes a start that has failed for one that left nothing.
        """
        launch = await child.in_thread(partial(prepare, self._config, section.app))
        # Of this node alone: others, in tests and demos, may have the same host.
        own = f"{section.app}.{section.platform}.{section.node}."
        await child.in_thread(partial(_fence, section.app, own))
        run = _Run(self._config, section, launch, self._kept)
        try:
            await run.start()
        except BaseException:
            await child.finish(asyncio.create_task(run.abandon(), name=f"{section.app} backend, giving up"))
            raise
        return run


# --- one start


class _Run:
    """Implements ``ports.Running``: one start of the program."""

    def __init__(self, config: Process, section: SectionContext, launch: Launch, kept: deque[str]) -> None:
        self._config, self._section, self._launch, self._kept = config, section, launch, kept
        self._app = section.app
        marker = f"{section.app}.{section.epoch}.{secrets.token_hex(8)}"
        self._group_name = f"{section.app}.{section.platform}.{section.node}.{marker.partition('.')[2]}"
        self._cgroup: cgroup_v2.Cgroup | None = None
        details = {"cgroup": cgroup_v2.path_of(self._group_name)} if launch.contained else {}
        self._resource = Resource("process", marker, section.app, section.epoch, details=details)
        self._child: child.Child | None = None
        self._gate: gate.Gate | None = None
        self._known: list[system.ProcessRef] = []
        """What a search found before the program was asked to end."""
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked_to_end = False
        self._killing: asyncio.Task[tuple[int, ...]] | None = None
        self._gone = False
        self._since = 0.0
        self._lines = logging.getLogger(f"phalanx.app.{section.app}")

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done when the program has ended by itself: how. Cancelling it does no harm to others who wait."""
        return asyncio.shield(self._ended)

    # --- start

    async def start(self) -> None:
        """From registration to the program's start; on failure the caller abandons it."""
        await self._section.register(self._resource)
        # To its end even if cancelled: a program whose group we do not know could not be killed as well.
        await child.finish(asyncio.create_task(self._spawn(), name=f"{self._app} backend, spawning"))
        assert self._child is not None
        self._resource = msgspec.structs.replace(
            self._resource, pgid=self._child.pid, start_time=self._child.start_time
        )
        await self._section.register(self._resource)
        await self._open()
        self._since = system.wall()
        log.info("app %s: started process %d", self._app, self._child.pid, extra={"app": self._app})

    async def wait_ready(self) -> None:
        """See ``ports.Running.wait_ready``."""
        assert self._child is not None
        if self._config.ready is not None:
            await self._wait_ready(self._child, self._config.ready)

    def status(self) -> ProgramStatus:
        """See ``ports.Running.status``."""
        pid = self._child.pid if self._child is not None else 0
        if self._gone or self._ended.done():
            state = ProgramState.ENDED
        elif self._asked_to_end:
            state = ProgramState.STOPPING
        else:
            state = ProgramState.RUNNING if self._since else ProgramState.STARTING
        return ProgramStatus(f"process {pid}", state, self._since)

    async def _spawn(self) -> None:
        env = {
            **self._launch.env,
            system.MARKER_ENV: self._resource.id,
            "PHALANX_PLATFORM": self._section.platform,
            "PHALANX_NODE": self._section.node,
            "PHALANX_APP": self._app,
            "PHALANX_EPOCH": str(self._section.epoch),
            **({"PHALANX_DATABASE": self._section.database} if self._section.database else {}),
        }
        start = partial(
            gate.spawn,
            (self._launch.program, *self._config.command[1:]),
            env=env,
            cwd=self._config.cwd,
            identity=self._launch.identity,
        )
        if self._launch.contained:
            await self._confine(self._make_cgroup)
        try:
            process, self._gate = await child.in_thread(start)
        except OSError as error:
            raise spawn_failed(self._app, self._launch.program, error) from error
        self._child = child.Child(process, self._on_line, self._on_exit)
        if self._cgroup is not None:
            await self._confine(partial(self._cgroup.add, process.pid))
        try:
            await child.in_thread(partial(limits.apply, self._config.limits, process.pid))
        except ProcessLookupError:
            pass  # the gate has ended; so the start has failed anyway
        except (OSError, ValueError) as error:
            raise BackendError(
                self._app, "start", f"its limits cannot be set: {error}", "lower them, or leave them out"
            ) from error

    def _make_cgroup(self) -> None:
        self._cgroup = cgroup_v2.create(self._group_name, limits.of_cgroup(self._config.limits))

    async def _confine(self, step: Callable[[], None]) -> None:
        """A step on the way into the control group. Where it is refused, the program runs without one, unless
        its limits need it."""
        try:
            await child.in_thread(step)
        except ProcessLookupError:
            pass
        except OSError as error:
            if limits.of_cgroup(self._config.limits):
                where = self._resource.details["cgroup"]
                raise BackendError(
                    self._app,
                    "start",
                    f"its limits cannot be set in {where}: {error.strerror or error}",
                    "put Delegate=yes into the node's service, or leave the limits out",
                ) from error
            log.warning("app %s: without a control group: %s", self._app, error, extra={"app": self._app})

    def _on_line(self, line: str) -> None:
        self._kept.append(line)
        self._lines.info("%s", line)

    async def _open(self) -> None:
        """Let it run: the keeper knows all that it needs."""
        assert self._gate is not None
        try:
            await child.in_thread(self._gate.open)
        except OSError as error:
            raise spawn_failed(self._app, self._launch.program, error) from error

    def _on_exit(self) -> None:
        assert self._child is not None
        if not self._asked_to_end and not self._ended.done():
            self._ended.set_result(self._child.how)

    async def _wait_ready(self, program: child.Child, check: Check) -> None:
        last = "no answer yet"

        def failed(detail: str) -> None:
            nonlocal last
            last = detail

        outcome = await readiness.wait(
            self._app, readiness.poll(check, failed), program.exited.wait(), self._config.ready_timeout
        )
        if program.look():
            program.output.drain()
            said = program.output.last_line[:300]
            problem = f"the program {program.how} before it was ready" + (f": {said}" if said else "")
            raise BackendError(self._app, "ready", problem, "its output is in the log")
        if outcome.error is not None:
            raise outcome.error
        if not outcome.passed:
            problem = f"not ready within {self._config.ready_timeout:g} s: {last}"
            raise BackendError(self._app, "ready", problem, "correct the ready check, or raise ready_timeout")

    async def abandon(self) -> None:
        """Kill what a failed start has left, until all of it is gone."""
        if self._gate is not None:
            self._gate.close()
        await until_gone(self._app, self.kill)

    # --- end

    async def stop(self, reason: str) -> None:
        """See ``ports.Running.stop``. If the program has ended by itself, this ends what it has left."""
        program = self._child
        if program is not None and not self._gone and not program.look():
            await self._end_gracefully(program, reason)
        await self._end("stop")

    async def _end_gracefully(self, program: child.Child, reason: str) -> None:
        """Signal the group, and give it its time. Who left the group has not heard of it, and gets none."""
        if not self._asked_to_end:
            await self._remember(program)
        if not self._asked_to_end:  # many programs take a second signal for "without any care"
            self._asked_to_end = True
            log.info("app %s: stopping process %d: %s", self._app, program.pid, reason)
            program.signal_group(getattr(signal, f"SIG{self._config.stop_signal}"))
            program.signal_group(signal.SIGCONT)  # one that is stopped could not act on it
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_timeout):
                await program.exited.wait()
                while await child.in_thread(partial(_group_lives, self._resource.id, program.pid)):  # noqa: ASYNC110
                    await asyncio.sleep(_GROUP_POLL_SECONDS)
                return
        log.warning(
            "app %s: still running %g s after SIG%s, killing it",
            self._app,
            self._config.stop_timeout,
            self._config.stop_signal,
        )

    async def _remember(self, program: child.Child) -> None:
        """Note its descendants while it lives: later some of them can't be told from anybody else's."""
        try:
            self._known = await child.in_thread(
                partial(system.find_processes, self._resource.id, program.pid, start_time=program.start_time)
            )
        except OSError as error:
            log.warning("app %s: cannot see its processes: %s", self._app, error)

    async def kill(self) -> None:
        """See ``ports.Running.kill``. A cancellation is raised only after the end."""
        await self._end("kill")

    async def _end(self, step: str) -> None:
        self._asked_to_end = True
        if self._gone:
            return
        if self._killing is None or self._killing.done():
            self._killing = asyncio.create_task(self._kill_all(), name=f"{self._app} backend, killing")
        try:
            remaining = await child.finish(self._killing)
        except OSError as error:
            raise BackendError(
                self._app,
                step,
                f"cannot see whether all of it is gone: {error}",
                "look at /proc and open files",
            ) from error
        if remaining:
            raise BackendError(
                self._app,
                step,
                f"processes {', '.join(map(str, remaining))} do not die",
                "look at them with ps: state D is a device or file system that hangs",
            )

    async def _kill_all(self) -> tuple[int, ...]:
        """SIGKILL and see that nobody is left; the pids of those who are. Only nobody is taken back."""
        program = self._child
        report = await child.in_thread(
            partial(
                system.kill_marked,
                self._resource.id,
                program.pid if program else None,
                start_time=program.start_time if program else 0,
                known=tuple(self._known),
                deadline_seconds=KILL_DEADLINE_SECONDS,
            )
        )
        if report.remaining:
            return report.remaining
        if self._cgroup is not None:
            if remaining := await child.in_thread(partial(_empty, self._cgroup)):
                return remaining
            self._cgroup = None
        if program is not None:
            program.look()
            program.reap()
            log.info("app %s: process %d %s", self._app, program.pid, program.how, extra={"app": self._app})
        self._gone = True
        self._section.unregister(self._resource.id)
        return ()


def _empty(group: cgroup_v2.Cgroup) -> tuple[int, ...]:
    """Kill what is in *group* and remove it; who does not die. Raises OSError."""
    if remaining := cgroup_v2.kill(group.path, KILL_DEADLINE_SECONDS):
        return tuple(remaining)
    group.remove()
    return ()


def _fence(app: str, names: str) -> list[str]:
    """See :meth:`ProcessBackend.fence`."""
    killed: list[str] = []
    for group in cgroup_v2.left_over(names):
        try:
            found = cgroup_v2.pids(group.path)
            killed += [f"process {pid}" for pid in found]
            if remaining := _empty(group):
                raise BackendError(
                    app,
                    "kill",
                    f"processes {', '.join(map(str, remaining))} of an earlier life do not die",
                    "look at them with ps: state D is a device or file system that hangs",
                )
        except OSError as error:
            raise BackendError(
                app,
                "kill",
                f"cannot empty {group.path}: {error.strerror or error}",
                "look at it and remove it",
            ) from error
        finally:
            group.release()
    if killed:
        log.warning("app %s: killed left-overs of an earlier life: %s", app, ", ".join(killed))
    return killed


def _group_lives(marker: str, pgid: int) -> bool:
    for pid in system.find_marked(marker, pgid):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == pgid:
                return True
    return False
