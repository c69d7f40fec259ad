"""One start of a systemd unit: followed by signals, stopped, killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from phalanx import cgroup, child, units
from phalanx.backends import readiness, systemd_unit
from phalanx.backends.abandoning import until_gone
from phalanx.backends.journal import read_journal
from phalanx.backends.systemd_manager import Manager, ManagerError, Service, Unit
from phalanx.config import Systemd
from phalanx.errors import BackendError
from phalanx.ports import SectionContext
from phalanx.types import ProgramState, ProgramStatus, Resource

log = logging.getLogger("phalanx.backend")

KILL_DEADLINE_SECONDS = 2.0

_RETRY_SECONDS = 0.5
_STATES = {
    "activating": ProgramState.STARTING,
    "active": ProgramState.RUNNING,
    "reloading": ProgramState.RUNNING,
    "deactivating": ProgramState.STOPPING,
}


class UnitRun:
    """Implements ``ports.Running``: one start of a unit. It owns *manager*."""

    def __init__(
        self,
        config: Systemd,
        section: SectionContext,
        manager: Manager,
        path: str,
        seen: tuple[Unit, Service],
        resource: Resource,
    ) -> None:
        self._config, self._section, self._manager, self._path = config, section, manager, path
        self._unit, self._service = seen
        self._app, self._name, self._resource = section.app, self._unit.id, resource
        self._invocation = ""
        """systemd's id of this start, once that has begun."""
        self._job, self._results = "", dict[str, str]()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stale, self._changed = asyncio.Event(), asyncio.Event()
        self._wanted = self._read = 0
        self._follower: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[units.Killed] | None = None
        self._asked_to_end = self._gone = False

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done when the unit has ended by itself: how. Cancelling it does no harm to others who wait."""
        return asyncio.shield(self._ended)

    # --- start

    async def start(self) -> None:
        """From registration until systemd has begun to start it; on failure the caller abandons it."""
        await self._section.register(self._resource)
        before = self._unit.invocation
        await self._permit()
        try:
            async with asyncio.timeout(self._config.ready_timeout):
                await self._follow()
                await self._reset_failed()
                (self._job,) = await self._manager.call("StartUnit", "ss", [self._name, "replace"])
                await self._refresh()
                await self._until(lambda: self._unit.invocation not in ("", before) or self._is_start_over())
                if self._unit.invocation in ("", before):
                    await self._refresh()  # what is known of it may be older than the end of its job
        except ManagerError as error:
            raise systemd_unit.failed(self._app, "start", self._name, error) from error
        except TimeoutError:
            problem = f"{self._name} was not started within {self._config.ready_timeout:g} s"
            remedy = "see what it waits for: systemctl list-jobs"
            raise BackendError(self._app, "start", problem, remedy) from None
        if self._unit.invocation in ("", before):
            raise self._not_started()
        self._invocation = self._unit.invocation
        await self._permit()
        if self._service.control_group not in ("", self._resource.details["cgroup"]):
            details = {**self._resource.details, "cgroup": self._service.control_group}
            self._resource = msgspec.structs.replace(self._resource, details=details)
            await self._section.register(self._resource)
        log.info("app %s: started unit %s", self._app, self._name, extra={"app": self._app})
        self._look_for_end()

    async def _reset_failed(self) -> None:
        """Earlier starts do not count against its start limit: how often it is started is for Phalanx."""
        try:
            await self._manager.call("ResetFailedUnit", "s", [self._name])
        except ManagerError as error:
            if not error.is_not_loaded:
                raise

    def _not_started(self) -> BackendError:
        result = self._results.get(self._job, "gone")
        why = {
            "assert": "an assertion of it does not hold (or its permit was taken away)",
            "dependency": "a unit that it needs cannot be started",
            "canceled": "its start was cancelled by somebody else",
        }.get(result, f"its start ended as {result!r}")
        if result == "done":
            why = "a condition of it does not hold (Condition…=)"
        remedy = f"see: systemctl status {self._name}"
        return BackendError(self._app, "start", f"{self._name}: {why}", remedy)

    async def take_up(self) -> None:
        """Go on with a unit that runs already. Raises BackendError, ManagerError; then it runs on."""
        self._invocation = self._unit.invocation
        await self._section.register(self._resource)
        await self._permit()
        try:
            async with asyncio.timeout(self._config.ready_timeout):
                await self._follow()
                await self._refresh()
        except TimeoutError:
            problem = f"systemd did not tell of {self._name} within {self._config.ready_timeout:g} s"
            raise BackendError(self._app, "start", problem, "look at systemd: systemctl status") from None
        log.info("app %s: adopted unit %s", self._app, self._name, extra={"app": self._app})

    async def _permit(self) -> None:
        env = {
            "PHALANX_PLATFORM": self._section.platform,
            "PHALANX_NODE": self._section.node,
            "PHALANX_APP": self._app,
            "PHALANX_EPOCH": str(self._section.epoch),
            **({"PHALANX_DATABASE": self._section.database} if self._section.database else {}),
        }
        try:
            # To its end even if cancelled: it must not come after the permit was taken back.
            await child.finish(child.in_thread(partial(units.permit, self._name, env, self._invocation)))
        except OSError as error:
            problem = f"cannot write {units.permit_path(self._name)}: {error.strerror or error}"
            raise BackendError(self._app, "start", problem, "run the node as root, and make room") from error

    # --- following it

    async def _follow(self) -> None:
        self._follower = asyncio.create_task(self._keep_reading(), name=f"{self._app} follow {self._name}")
        await self._manager.watch(self._name, self._path, self._stale.set, self._results.__setitem__)

    async def _keep_reading(self) -> None:
        told = False
        while True:
            await self._stale.wait()
            self._stale.clear()
            number = self._wanted
            try:
                self._unit, self._service = await self._manager.read(self._path)
            except ManagerError as error:
                if not told:
                    log.warning("app %s: systemd does not tell of %s: %s", self._app, self._name, error)
                told = True
                self._stale.set()
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            except Exception:  # of the library: without this task no end would ever be seen
                log.exception("app %s: the state of %s cannot be read", self._app, self._name)
                self._stale.set()
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            told = False
            self._read = number
            self._look_for_end()
            self._pulse()

    def _pulse(self) -> None:
        """Have all who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _look_for_end(self) -> None:
        if not self._invocation or self._asked_to_end or self._ended.done():
            return
        if self._unit.invocation not in ("", self._invocation):
            self._ended.set_result("was restarted by somebody else")
        elif self._unit.active_state in ("deactivating", "inactive", "failed"):
            # Of one that is deactivating the program has ended, and what it left is being ended; or somebody
            # else stops it.
            self._ended.set_result(systemd_unit.how_ended(self._unit, self._service))

    async def _refresh(self) -> None:
        """Wait until its state was read anew."""
        self._wanted += 1
        wanted = self._wanted
        self._stale.set()
        await self._until(lambda: self._read >= wanted)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _is_start_over(self) -> bool:
        # By its state too: of a job that ends while the connection is broken nobody tells.
        return self._job in self._results or self._unit.job[1] != self._job

    # --- ready

    async def wait_ready(self) -> None:
        """See ``ports.Running.wait_ready``."""
        seen = deque(["systemd has not finished its start"], maxlen=1)

        async def serve() -> None:
            if self._job:
                await self._until(lambda: self._is_start_over() and not self._fails())
            if self._config.ready is not None:
                await readiness.poll(self._config.ready, seen.append)

        outcome = await readiness.wait(
            self._app, serve(), self._until(self._fails), self._config.ready_timeout
        )
        if self._fails():
            raise BackendError(self._app, "ready", await self._failure(), f"see: {self._journal_command}")
        if outcome.error is not None:
            raise outcome.error
        if not outcome.passed:
            problem = f"not ready within {self._config.ready_timeout:g} s: {seen[-1]}"
            raise BackendError(self._app, "ready", problem, "correct the ready check, or raise ready_timeout")

    def _fails(self) -> bool:
        """Whether its start has failed, or it has ended."""
        return self._ended.done() or self._results.get(self._job, "done") != "done"

    @property
    def _journal_command(self) -> str:
        return f"journalctl --unit={self._name}"

    async def _failure(self) -> str:
        how = systemd_unit.how_ended(self._unit, self._service)
        if self._ended.done():
            how = self._ended.result()
        match = f"_SYSTEMD_INVOCATION_ID={self._invocation}"
        said = ""
        with contextlib.suppress(OSError):
            said = "".join(await child.in_thread(partial(read_journal, match, 1)))[:300]
        return f"{self._name} {how} before it was ready" + (f": {said}" if said else "")

    def status(self) -> ProgramStatus:
        """See ``ports.Running.status``."""
        state = _STATES.get(self._unit.active_state, ProgramState.ENDED)
        if self._gone or self._ended.done():
            state = ProgramState.ENDED
        elif self._asked_to_end:
            state = ProgramState.STOPPING
        elif not self._invocation:
            state = ProgramState.STARTING
        detail: list[str] = []
        if self._service.main_pid and state is not ProgramState.ENDED:
            detail.append(f"main process {self._service.main_pid}")
            if (used := cgroup.memory_bytes(self._resource.details["cgroup"])) is not None:
                detail.append(f"{used / (1 << 20):.0f} MiB")
        since = self._unit.inactive_exit_timestamp / 1e6 if self._invocation else 0.0
        return ProgramStatus(f"unit {self._name}", state, since, detail=", ".join(detail))

    # --- end

    async def stop(self, reason: str) -> None:
        """See ``ports.Running.stop``. If the unit has ended by itself, this ends what it has left."""
        if not self._gone and not (self._ended.done() and systemd_unit.has_exited(self._unit, self._service)):
            await self._end_gracefully(reason)
        await self._end("stop")

    async def _end_gracefully(self, reason: str) -> None:
        if not self._asked_to_end:
            log.info("app %s: stopping unit %s: %s", self._app, self._name, reason)
        self._asked_to_end = True
        seconds = self._config.stop_timeout
        try:
            async with asyncio.timeout(seconds):
                await self._manager.call("StopUnit", "ss", [self._name, "replace"], timeout=seconds)
                await self._refresh()
                await self._until(lambda: self._gone or not (self._unit.runs or self._unit.job[0]))
        except TimeoutError:
            log.warning("app %s: unit %s still runs after %g s, killing it", self._app, self._name, seconds)
        except ManagerError as error:
            if self._gone:  # somebody killed it meanwhile
                return
            log.warning("app %s: systemd does not stop %s (%s), killing it", self._app, self._name, error)

    async def kill(self) -> None:
        """See ``ports.Running.kill``. A cancellation is raised only after the end."""
        await self._end("kill")

    async def abandon(self) -> None:
        """Kill what a failed start has left, until all of it is gone."""
        await until_gone(self._app, self.kill)

    async def _end(self, step: str) -> None:
        self._asked_to_end = True
        if self._gone:
            return
        if self._killing is None or self._killing.done():
            self._killing = asyncio.create_task(self._kill_all(), name=f"{self._app} backend, killing")
        try:
            report = await child.finish(self._killing)
        except (OSError, ValueError) as error:
            problem = f"cannot see whether all of {self._name} is gone: {error}"
            raise BackendError(self._app, step, problem, "look at its control group") from error
        if not report.is_gone:
            who = f"processes {', '.join(map(str, report.remaining))} of {self._name} do not die"
            problem = who if report.remaining else f"{self._name} does not end: {report.problem}"
            remedy = "look at them with ps: state D is a device or file system that hangs"
            raise BackendError(self._app, step, problem, remedy if report.remaining else "see systemd's log")

    async def _kill_all(self) -> units.Killed:
        """Kill, and see that nothing is left and nothing comes. Only then it is taken back."""
        group = self._resource.details["cgroup"]
        await child.in_thread(partial(units.take_permit_back, self._name))
        report = await self._over(group)
        if report is None:
            report = await child.in_thread(partial(units.kill, self._name, group, KILL_DEADLINE_SECONDS))
        if report.is_gone:
            if report.problem:
                log.error("app %s: systemd did not confirm: %s", self._app, report.problem)
            log.info("app %s: unit %s has ended", self._app, self._name, extra={"app": self._app})
            self._gone = True
            self._pulse()
            await self._let_go()
            self._section.unregister(self._resource.id)
        return report

    async def _over(self, group: str) -> units.Killed | None:
        """Without killing, if systemd says that it does not run: as after a stop. Else None."""
        if self._unit.runs:
            return None
        try:
            # Over the connection that a start was sent by, or else the permit keeps that start from running.
            unit = await self._manager.unit(self._path)
        except ManagerError:
            return None
        if unit.runs or unit.job[0] or await child.in_thread(partial(cgroup.processes, group)):
            return None
        return units.Killed(True, (), (), "")

    async def _let_go(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._manager.close()
