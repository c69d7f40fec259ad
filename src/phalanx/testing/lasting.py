"""A backend for tests whose program outlives its node: a process that no kernel ends with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import subprocess
from functools import partial

import msgspec

from phalanx import system
from phalanx.ports import SectionContext
from phalanx.types import ProgramState, ProgramStatus, Resource

_SPAWN = 'setsid "$@" >/dev/null 2>&1 </dev/null & echo $!'


class LastingBackend:
    """Implements ``ports.Backend``. *command*: what runs, split as a shell would."""

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)

    async def prepare(self, app: str) -> None:
        """Nothing to look for."""

    async def fence(self, app: str) -> list[str]:
        """The keeper has killed what is left."""
        return []

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """It keeps none."""
        return []

    async def start(self, section: SectionContext) -> LastingRun:
        """See ``ports.Backend.start``."""
        marker = f"{section.app}.{section.epoch}.{secrets.token_hex(8)}"
        resource = Resource("process", marker, section.app, section.epoch, adoptable=True)
        await section.register(resource)
        env = {**os.environ, system.MARKER_ENV: marker, "PHALANX_EPOCH": str(section.epoch)}
        pid = await asyncio.to_thread(partial(self._spawn, env))
        resource = msgspec.structs.replace(resource, pgid=pid, start_time=system.process_start_time(pid))
        await section.register(resource)
        return LastingRun(section, resource)

    async def adopt(self, section: SectionContext, resource: Resource) -> LastingRun | None:
        """See ``ports.Backend.adopt``."""
        ref = system.ProcessRef(resource.pgid, resource.start_time)
        return LastingRun(section, resource) if ref.alive() else None

    def _spawn(self, env: dict[str, str]) -> int:
        # Not our child: a node that goes on would have to wait for it, and a new one could not.
        done = subprocess.run(
            ["/bin/sh", "-c", _SPAWN, "sh", *self._command], env=env, capture_output=True, check=True
        )
        return int(done.stdout)


class LastingRun:
    """Implements ``ports.Running``."""

    def __init__(self, section: SectionContext, resource: Resource) -> None:
        self._section, self._resource = section, resource
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked = False
        self._watch = system.watch_exit(resource.pgid, self._on_exit)

    @property
    def ended(self) -> asyncio.Future[str]:
        """See ``ports.Running.ended``."""
        return asyncio.shield(self._ended)

    def _on_exit(self) -> None:
        if not self._asked and not self._ended.done():
            self._ended.set_result("exited")

    def status(self) -> ProgramStatus:
        """See ``ports.Running.status``."""
        state = ProgramState.ENDED if self._ended.done() else ProgramState.RUNNING
        return ProgramStatus(f"process {self._resource.pgid}", state)

    async def wait_ready(self) -> None:
        """At once."""

    async def stop(self, reason: str) -> None:
        """See ``ports.Running.stop``."""
        self._asked = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._resource.pgid, signal.SIGTERM)
        await self.kill()

    async def kill(self) -> None:
        """See ``ports.Running.kill``."""
        self._asked = True
        await asyncio.to_thread(system.kill_marked, self._resource.id, self._resource.pgid)
        self._section.unregister(self._resource.id)
