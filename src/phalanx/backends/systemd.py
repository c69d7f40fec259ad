"""A systemd unit as backend, over D-Bus.

The invariant: from before its start until nothing of it runs, the keeper has the unit and its control group.
It runs only while its permit is there (:mod:`phalanx.units`), which is written after the keeper knows the
unit, and taken back before it is looked whether all of it is gone.

What it does is followed by systemd's signals; each is only a reason to read its state again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncGenerator
from functools import partial

from phalanx import child, system, units
from phalanx.backends import systemd_unit
from phalanx.backends.journal import read_journal
from phalanx.backends.systemd_manager import RELOAD_SECONDS, Manager, ManagerError, Service, Unit
from phalanx.backends.systemd_run import KILL_DEADLINE_SECONDS, UnitRun
from phalanx.config import Systemd
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.backend")

LOST_SECONDS = 30.0
"""A unit that is to be taken up is given up when systemd has not told of it for that long."""

_RETRY_SECONDS = 0.5


class SystemdBackend:
    """Implements ``ports.Backend`` for :class:`phalanx.config.Systemd`."""

    def __init__(self, config: Systemd) -> None:
        self._config = config

    async def prepare(self, app: str) -> None:
        """See ``ports.Backend.prepare``."""
        async with self._asking(app, "prepare") as manager:
            _, unit, service = await self._look(manager, app)
            permit = await child.in_thread(partial(units.read_permit, unit.id))
            if permit is None:
                _refuse_strangers(app, unit)
            await child.in_thread(partial(_check_rights, app, unit, service))

    async def start(self, section: SectionContext) -> Running:
        """Register, permit, start. See ``ports.Backend.start``.

        On a failure or cancellation it returns only when nothing is left, however long processes take to
        die: the section takes a start that has failed for one that left nothing.
        """
        app, manager = section.app, Manager()
        try:
            async with self._failures(app, "prepare"):
                path, unit, service = await self._look(manager, app)
                unit, service = await self._guard(manager, app, path, unit, service)
                group = service.control_group or systemd_unit.control_group(
                    await manager.root(), service.slice, unit.id
                )
            if await self._end_left_over(app, unit, group, ours_too=True):
                async with self._failures(app, "prepare"):
                    unit, service = await manager.read(path)
            _refuse_strangers(app, unit)
        except BaseException:
            await manager.close()
            raise
        run = UnitRun(self._config, section, manager, path, (unit, service), _resource(section, unit, group))
        try:
            await run.start()
        except BaseException:
            await child.finish(asyncio.create_task(run.abandon(), name=f"{app} backend, giving up"))
            raise
        return run

    async def fence(self, app: str) -> list[str]:
        """What a node that is gone has left running: its permit tells. See ``ports.Backend.fence``."""
        async with self._asking(app, "kill") as manager:
            path = await manager.load(self._config.unit)
            unit, service = await manager.read(path)
            group = service.control_group or systemd_unit.control_group(
                await manager.root(), service.slice, unit.id
            )
            return await self._end_left_over(app, unit, group, ours_too=False)

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """See ``ports.Backend.adopt``: the very start that its permit tells of, not a later one."""
        try:
            run = await self._take_up(section, resource)
        except BaseException:
            await child.finish(
                asyncio.create_task(_end_for_certain(resource), name=f"{section.app} backend, giving up")
            )
            section.unregister(resource.id)
            raise
        if run is None:
            await child.finish(
                asyncio.create_task(_end_for_certain(resource), name=f"{section.app} backend, giving up")
            )
        return run

    async def _take_up(self, section: SectionContext, resource: Resource) -> UnitRun | None:
        """The start that *resource* is, if it still runs. Raises BackendError."""
        app, manager = section.app, Manager()
        try:
            async with self._failures(app, "start"):
                path, unit, service = await self._read_patiently(manager, app)
                permit = await child.in_thread(partial(units.read_permit, unit.id))
                if (
                    resource.details.get("unit") != unit.id
                    or permit is None
                    or permit.invocation != unit.invocation
                    or unit.active_state not in ("active", "reloading")
                ):
                    await manager.close()
                    return None
                taken = _resource(section, unit, service.control_group, resource.id)
                run = UnitRun(self._config, section, manager, path, (unit, service), taken)
                try:
                    await run.take_up()
                except BaseException:
                    await child.finish(asyncio.create_task(run.abandon(), name=f"{app} backend, giving up"))
                    raise
                return run
        except BaseException:
            await manager.close()
            raise

    async def _read_patiently(self, manager: Manager, app: str) -> tuple[str, Unit, Service]:
        """Its state; a bus that is away may come back, and the unit runs on. Raises ManagerError."""
        deadline = system.now() + LOST_SECONDS
        while True:
            try:
                path = await manager.load(self._config.unit)
                return path, *await manager.read(path)
            except ManagerError as error:
                if system.now() > deadline:
                    raise
                log.warning("app %s: %s is not taken up yet: %s", app, self._config.unit, error)
            await asyncio.sleep(_RETRY_SECONDS)

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """See ``ports.Backend.logs``: from the journal, of all starts of the unit."""
        try:
            return await child.in_thread(partial(read_journal, f"_SYSTEMD_UNIT={self._config.unit}", lines))
        except OSError as error:
            raise BackendError(
                app, "logs", str(error), f"see: journalctl --unit={self._config.unit}"
            ) from error

    # --- steps

    async def _look(self, manager: Manager, app: str) -> tuple[str, Unit, Service]:
        """The unit, which can be run by Phalanx. Raises BackendError (``prepare``), ManagerError."""
        path = await manager.load(self._config.unit)
        unit, service = await manager.read(path)
        if refusal := systemd_unit.refusal(self._config.unit, unit, service):
            raise BackendError(app, "prepare", *refusal)
        return path, unit, service

    async def _guard(
        self, manager: Manager, app: str, path: str, unit: Unit, service: Service
    ) -> tuple[Unit, Service]:
        """See to it that the unit can be started by its permit only. Once per boot it reloads systemd."""
        if systemd_unit.is_guarded(unit, service):
            return unit, service
        await child.in_thread(partial(_check_rights, app, unit, service))
        log.info("app %s: guarding %s, which reloads systemd", app, unit.id)
        await child.finish(child.in_thread(partial(units.write_guard, unit.id)))
        await manager.call("Reload", timeout=RELOAD_SECONDS)
        unit, service = await manager.read(path)
        if not systemd_unit.is_guarded(unit, service):
            raise BackendError(
                app,
                "prepare",
                f"{unit.id} is not as {units.guard_path(unit.id)} says: another drop-in wins",
                f"see: systemctl cat {unit.id}",
            )
        return unit, service

    async def _end_left_over(self, app: str, unit: Unit, group: str, *, ours_too: bool) -> list[str]:
        """Kill what runs by the permit of a node that is gone, or of this one where it starts just now."""
        permit = await child.in_thread(partial(units.read_permit, unit.id))
        if permit is None:
            return []
        if permit.is_held and not (ours_too and permit.app == app and permit.node.pid == os.getpid()):
            if not ours_too:
                return []
            raise BackendError(
                app,
                "prepare",
                f"{unit.id} is run by process {permit.node.pid} of this host for app {permit.app!r}",
                "give each app and each node of a host a unit of its own (an instance of a template)",
            )
        kill = partial(units.kill, unit.id, group, KILL_DEADLINE_SECONDS)
        try:
            report = await child.finish(child.in_thread(kill))
        except (OSError, ValueError) as error:
            raise BackendError(app, "kill", f"left-over {unit.id}: {error}") from error
        if not report.is_gone:
            what = f"processes {report.remaining}" if report.remaining else report.problem
            raise BackendError(app, "kill", f"left-over {unit.id} does not end: {what}")
        return [f"unit {unit.id}"] if report.killed else []

    # --- how it fails

    @contextlib.asynccontextmanager
    async def _asking(self, app: str, step: str) -> AsyncGenerator[Manager]:
        manager = Manager()
        try:
            async with self._failures(app, step):
                yield manager
        finally:
            await manager.close()

    @contextlib.asynccontextmanager
    async def _failures(self, app: str, step: str) -> AsyncGenerator[None]:
        try:
            yield
        except ManagerError as error:
            raise systemd_unit.failed(app, step, self._config.unit, error) from error
        except OSError as error:
            problem = f"{self._config.unit}: {error}"
            raise BackendError(app, step, problem, "run the node as root, and make room") from error


def _resource(section: SectionContext, unit: Unit, group: str, resource_id: str = "") -> Resource:
    marker = resource_id or f"{section.app}.{section.epoch}.{secrets.token_hex(8)}"
    details = {"unit": unit.id, "cgroup": group}
    return Resource("unit", marker, section.app, section.epoch, details=details, adoptable=True)


async def _end_for_certain(resource: Resource) -> None:
    """Return when nothing of what *resource* names runs, as the keeper would have it."""
    unit, group = resource.details["unit"], resource.details["cgroup"]
    while True:
        try:
            report = await child.in_thread(partial(units.kill, unit, group, KILL_DEADLINE_SECONDS))
        except (OSError, ValueError) as error:
            problem = str(error)
        else:
            if report.is_gone:
                return
            problem = report.problem
        log.critical("app %s: left-over %s does not end: %s; trying on", resource.app, unit, problem)
        await asyncio.sleep(_RETRY_SECONDS)


def _refuse_strangers(app: str, unit: Unit) -> None:
    if unit.runs or unit.job[0]:
        raise BackendError(
            app,
            "prepare",
            f"{unit.id} runs already ({unit.active_state}), and it was not started by Phalanx",
            f"systemctl stop {unit.id}, and from then on leave its start to Phalanx",
        )


def _check_rights(app: str, unit: Unit, service: Service) -> None:
    """Whether this process may write what it has to. Raises BackendError (``prepare``)."""
    if os.geteuid() == 0:
        return
    missing = [] if systemd_unit.is_guarded(unit, service) else [str(units.guard_path(unit.id))]
    if not os.access(units.PERMITS, os.W_OK):
        missing.append(str(units.PERMITS))
    if missing:
        raise BackendError(
            app,
            "prepare",
            f"only root can run {unit.id}: this user cannot write {' and '.join(missing)}",
            "run the node as root, or see docs/backends.md",
        )
