"""A program as backend: in a session of its own, known to the keeper before it runs, all of it gone after.

The invariant: from before the spawn until nothing of it runs, the keeper has the marker by which every
process of the section can be found and killed. It is taken back only after a scan that found nobody. The
program itself runs only once the keeper has its group as well: until then it waits behind a gate.

Where there is cgroup v2, and the node may use it, the program is in a control group of its own before it
runs: nothing it starts can leave that, and the kernel kills it as one. The search for the marker goes on all
the same: a session manager (pam_systemd, by sudo or su) may have moved something elsewhere.

Its parent is the node's holder (:mod:`phalanx.backends.holder`), so that it outlives the node in a pause.
Where there is none (macOS) it is a child of the node, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from phalanx import cgroup_v2, child, system
from phalanx.backends import gate, limits, readiness
from phalanx.backends.abandoning import RETRY_SECONDS, until_gone
from phalanx.backends.held import HeldProcess
from phalanx.backends.holder import Claim, Holder, HolderGone
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

    def __init__(self, config: Process, holder: Holder | None = None) -> None:
        self._config, self._holder = config, holder
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
        """See ``ports.Backend.adopt``: that very process, held for that very section.

        One that has ended meanwhile is taken up too: what it is asked first is how it ended.
        """
        try:
            run = await self._take_up(section, resource)
        except BaseException:
            await self._give_up(section, resource)
            section.unregister(resource.id)
            raise
        if run is None:
            await self._give_up(section, resource)
        return run

    async def _give_up(self, section: SectionContext, resource: Resource) -> None:
        ending = asyncio.create_task(_end_for_certain(resource), name=f"{section.app} backend, giving up")
        try:
            await child.finish(ending)
        finally:
            if self._holder is not None:
                self._holder.forget_claim(resource.id)

    async def _take_up(self, section: SectionContext, resource: Resource) -> _Run | None:
        app, holder = section.app, self._holder
        if holder is None:
            return None
        try:
            claim = await holder.claim(resource.id)
            if claim is None or not _is_what_was_left(section, resource, claim):
                log.warning("app %s: no holder has process %d of an earlier life", app, resource.pgid)
                return None
        except OSError as error:
            log.error("app %s: process %d is not taken up: %s", app, resource.pgid, error)
            return None
        run = _Run(self._config, section, resource, self._kept, holder)
        try:
            await child.finish(asyncio.create_task(run.take_up(), name=f"{app} backend, taking up"))
            await section.register(resource)
        except BaseException as error:
            await child.finish(asyncio.create_task(run.abandon(), name=f"{app} backend, giving up"))
            if not isinstance(error, OSError):
                raise
            log.error("app %s: process %d is not taken up: %s", app, resource.pgid, error)
            return None
        return run

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
        if self._holder is not None:
            await self._holder.forget_claims(section.app)  # it holds the groups of that as well
        await child.in_thread(partial(_fence, section.app, own))
        marker = f"{section.app}.{section.epoch}.{secrets.token_hex(8)}"
        details = {"cgroup": cgroup_v2.path_of(own + marker.partition(".")[2])} if launch.contained else {}
        resource = Resource("process", marker, section.app, section.epoch, details=details)
        run = _Run(self._config, section, resource, self._kept, self._holder)
        try:
            await run.start(launch)
        except BaseException:
            await child.finish(asyncio.create_task(run.abandon(), name=f"{section.app} backend, giving up"))
            raise
        return run


# --- one start


class _Run:
    """Implements ``ports.Running``: one start of the program."""

    def __init__(
        self,
        config: Process,
        section: SectionContext,
        resource: Resource,
        kept: deque[str],
        holder: Holder | None,
    ) -> None:
        self._config, self._section, self._resource, self._kept = config, section, resource, kept
        self._holder = holder
        self._app = section.app
        self._cgroup: cgroup_v2.Cgroup | None = None
        self._child: child.Child | HeldProcess | None = None
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

    async def start(self, launch: Launch) -> None:
        """From registration to the program's start; on failure the caller abandons it."""
        await self._section.register(self._resource)
        # To its end even if cancelled: a program whose group we do not know could not be killed as well.
        await child.finish(asyncio.create_task(self._spawn(launch), name=f"{self._app} backend, spawning"))
        assert self._child is not None
        self._resource = msgspec.structs.replace(
            self._resource,
            pgid=self._child.pid,
            start_time=self._child.start_time,
            adoptable=isinstance(self._child, HeldProcess),
        )
        await self._section.register(self._resource)
        await self._open(launch)
        self._since = system.wall()
        log.info("app %s: started process %d", self._app, self._child.pid, extra={"app": self._app})

    async def take_up(self) -> None:
        """Go on with what an earlier life of the node has started. Raises OSError."""
        assert self._holder is not None
        taken = await self._holder.take(self._resource.id, self._on_line, self._on_exit)
        if taken is None:
            raise HolderGone("its holder does not have it any more")
        self._child = taken.process
        if taken.group is not None:
            self._cgroup = cgroup_v2.Cgroup(self._resource.details["cgroup"], taken.group)
        if taken.dropped:
            self._on_line(f"[{taken.dropped} bytes left out: the node was away]")
        for line in taken.output.splitlines():
            self._on_line(line.decode(errors="replace").rstrip())
        self._since = system.wall() - system.process_age_seconds(self._child.start_time)
        log.info("app %s: adopted process %d", self._app, self._child.pid, extra={"app": self._app})
        if self._child.exited.is_set():
            self._ended.set_result(f"{self._child.how} while the node was away")

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

    async def _spawn(self, launch: Launch) -> None:
        if launch.contained:
            await self._confine(self._make_cgroup)
        try:
            program, self._gate = await self._begin(launch)
        except OSError as error:
            raise spawn_failed(self._app, launch.program, error) from error
        self._child = program
        if program.exited.is_set():
            self._on_exit()
        if self._cgroup is not None:
            await self._confine(partial(self._cgroup.add, program.pid))
        try:
            await child.in_thread(partial(limits.apply, self._config.limits, program.pid))
        except ProcessLookupError:
            pass  # the gate has ended; so the start has failed anyway
        except (OSError, ValueError) as error:
            raise BackendError(
                self._app, "start", f"its limits cannot be set: {error}", "lower them, or leave them out"
            ) from error

    async def _begin(self, launch: Launch) -> tuple[child.Child | HeldProcess, gate.Gate]:
        """The program behind its gate. Raises OSError."""
        command = (launch.program, *self._config.command[1:])
        env = self._environment(launch)
        if (holder := self._holder) is None:
            start = partial(gate.spawn, command, env=env, cwd=self._config.cwd, identity=launch.identity)
            process, held_back = await child.in_thread(start)
            return child.Child(process, self._on_line, self._on_exit), held_back

        async def start_held(wrapped: Sequence[str], stdin: int) -> HeldProcess:
            return await holder.spawn(
                self._resource.id,
                wrapped,
                env=env,
                cwd=self._config.cwd,
                identity=launch.identity,
                stdin=stdin,
                group=(self._cgroup.path, self._cgroup.fileno()) if self._cgroup is not None else None,
                on_line=self._on_line,
                on_exit=self._on_exit,
            )

        return await gate.spawn_by(start_held, command, env, launch.identity)

    def _environment(self, launch: Launch) -> dict[str, str]:
        return {
            **launch.env,
            system.MARKER_ENV: self._resource.id,
            "PHALANX_PLATFORM": self._section.platform,
            "PHALANX_NODE": self._section.node,
            "PHALANX_APP": self._app,
            "PHALANX_EPOCH": str(self._section.epoch),
            **({"PHALANX_DATABASE": self._section.database} if self._section.database else {}),
        }

    def _make_cgroup(self) -> None:
        name = os.path.basename(self._resource.details["cgroup"]).removeprefix(cgroup_v2.PREFIX)
        self._cgroup = cgroup_v2.create(name, limits.of_cgroup(self._config.limits))

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

    async def _open(self, launch: Launch) -> None:
        """Let it run: the keeper knows all that it needs."""
        assert self._gate is not None
        try:
            await child.in_thread(self._gate.open)
        except OSError as error:
            raise spawn_failed(self._app, launch.program, error) from error

    def _on_exit(self) -> None:
        if self._child is None:
            return  # it is just being started or taken up, which looks again
        if not self._asked_to_end and not self._ended.done():
            self._ended.set_result(self._child.how)

    async def _wait_ready(self, program: child.Child | HeldProcess, check: Check) -> None:
        last = "no answer yet"

        def failed(detail: str) -> None:
            nonlocal last
            last = detail

        outcome = await readiness.wait(
            self._app, readiness.poll(check, failed), program.exited.wait(), self._config.ready_timeout
        )
        if program.look():
            await program.exited.wait()
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

    async def _end_gracefully(self, program: child.Child | HeldProcess, reason: str) -> None:
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

    async def _remember(self, program: child.Child | HeldProcess) -> None:
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
            how = program.how or "has ended"
            log.info("app %s: process %d %s", self._app, program.pid, how, extra={"app": self._app})
        self._gone = True
        self._section.unregister(self._resource.id)
        return ()


def _is_what_was_left(section: SectionContext, resource: Resource, claim: Claim) -> bool:
    """Whether the holder has the very process that the keeper knows, for this very section."""
    same = claim.ref == system.ProcessRef(resource.pgid, resource.start_time)
    return same and (resource.app, resource.epoch) == (section.app, section.epoch)


async def _end_for_certain(resource: Resource) -> None:
    """Return when nothing of what *resource* names runs, as the keeper would have it."""
    while True:
        try:
            report = await child.in_thread(
                partial(
                    system.kill_marked,
                    resource.id,
                    resource.pgid or None,
                    start_time=resource.start_time,
                    deadline_seconds=KILL_DEADLINE_SECONDS,
                )
            )
            remaining = report.remaining
            if not remaining and (path := resource.details.get("cgroup", "")):
                kill = partial(cgroup_v2.kill_and_remove, path, KILL_DEADLINE_SECONDS)
                remaining = await child.in_thread(kill)
        except (OSError, ValueError) as error:
            problem = f"cannot see whether all of it is gone: {error}"
        else:
            if not remaining:
                return
            problem = f"processes {remaining} do not die"
        log.critical("app %s: left-over %s: %s; trying on", resource.app, resource.id, problem)
        await asyncio.sleep(RETRY_SECONDS)


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
