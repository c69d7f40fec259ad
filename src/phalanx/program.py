"""The backend of one active section: started, kept running, started again in place, ended.

A restart in place keeps the epoch, the addresses and the database: only the program is ended and started.
Whether there is one, and when, is decided by :mod:`phalanx.decide.restart`; what the app remembers of it over
its sections is in :class:`RestartPolicy`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn, Protocol

import msgspec

from phalanx import system
from phalanx.config import Restart
from phalanx.decide.restart import Decision, FailOver, RestartIn, RestartRule, Restarts
from phalanx.errors import BackendError
from phalanx.ports import Backend, Running, SectionContext
from phalanx.types import ProgramStatus, Resource

log = logging.getLogger("phalanx.section")

LOOK_SECONDS = 0.25
"""How often it is asked whether another node could take over by now, while a restart waits for its time."""


class Restarting(Protocol):
    """Who hears of restarts: the app."""

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate now."""
        ...

    def on_program_ended(self, how: str) -> None:
        """The program has ended by itself."""
        ...

    async def wait_while_paused(self, problem: str) -> None:
        """Return at once; or, if the app is paused, report *problem* and return when it no longer is."""
        ...

    def on_restarting(self, reason: str, decision: RestartIn, restarts: int) -> None:
        """It is to be started again; *restarts* of the window are used then."""
        ...

    def on_restarted(self, seconds: float) -> None:
        """It runs again and is ready, so many seconds after the failure."""
        ...


class RestartPolicy:
    """What one app remembers of its restarts on this node, over all its sections."""

    def __init__(self, config: Restart, app: Restarting) -> None:
        self._rule = RestartRule(
            config.count, float(config.window), float(config.delay), float(config.longest_delay)
        )
        self.app = app
        self._restarts = Restarts()

    def decide(self) -> Decision:
        """What is to be done about a failure now."""
        return self._restarts.decide(system.now(), self._rule, others=self.app.others_can())

    def begin(self, reason: str, decision: RestartIn) -> None:
        """A restart begins."""
        now = system.now()
        self._restarts = self._restarts.restarted(now, self._rule)
        self.app.on_restarting(reason, decision, self._restarts.recent(now, self._rule))


class Program:
    """One section's program. ``running`` is None before its start and after its end."""

    def __init__(self, backend: Backend, section: SectionContext, policy: RestartPolicy) -> None:
        self._backend, self._section, self._policy = backend, section, policy
        self.running: Running | None = None
        self.restarts = 0
        """Restarts in place in this section."""
        self.steady_since = system.now()
        """Since when it is ready, without a restart since."""
        self.is_adopted = False
        """Whether it runs since an earlier life of the node."""
        self._because = ""
        """Why it is being restarted, until it is ready again: a restart that was interrupted goes on."""
        self._ask = asyncio.Event()

    @property
    def is_restarting(self) -> bool:
        """Whether it is being started again in place, and not ready yet."""
        return bool(self._because)

    def status(self) -> ProgramStatus | None:
        """What it does now; None while there is none."""
        if self.running is None:
            return None
        return msgspec.structs.replace(self.running.status(), restarts=self.restarts)

    async def start(self) -> None:
        """See ``ports.Backend.start``."""
        self.running = await self._backend.start(self._section)

    async def adopt(self, resource: Resource) -> None:
        """Take up what an earlier life of the node has left running. If it has ended meanwhile it is started
        anew, but not while the app is paused."""
        self.running = await self._backend.adopt(self._section, resource)
        self.is_adopted = self.running is not None
        if self.running is None:
            self._section.unregister(resource.id)
            await self._policy.app.wait_while_paused("its program has ended while the node was away")
            await self.start()

    def leave(self) -> None:
        """Let go of it: it outlives this node."""
        self.running = None

    async def wait_ready(self) -> None:
        """Wait until it serves. If it does not it is killed; raises BackendError."""
        assert self.running is not None
        if self.is_adopted:
            self.is_adopted, self.steady_since = False, system.now()
            return  # it was; should it not work any more, its checks will tell
        try:
            await self.running.wait_ready()
        except BackendError:
            # It never served anybody: no grace, which would only hold up the next try.
            await self.end("it did not become ready", graceful=False)
            raise
        self.steady_since = system.now()

    async def end(self, reason: str, *, graceful: bool) -> None:
        """End what there is of it. Raises BackendError if something does not die."""
        if self.running is None:
            return  # its start failed or was cancelled, and left nothing behind
        if graceful:
            await self.running.stop(reason)
        else:
            await self.running.kill()
        self.running = None

    def restart(self, reason: str) -> None:
        """Have :meth:`keep` start it again, because it runs but does not work (any more)."""
        if not self._because and not self._ask.is_set():
            self._because = reason
            self._ask.set()

    async def keep(self) -> NoReturn:
        """Keep it running, by restarts in place, until cancelled or the program has to be given up here.

        Raises BackendError then, with the last failure; SessionLost when a restart finds no session.
        May be called again after it was cancelled.
        """
        while True:
            if not self._because:
                await self._failure()
            await self._restart()

    async def _failure(self) -> None:
        """Wait until it has ended by itself, or :meth:`restart` was called."""
        assert self.running is not None
        ended, asked = asyncio.ensure_future(self.running.ended), asyncio.create_task(self._ask.wait())
        try:
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                self._because = ended.result()
                self._policy.app.on_program_ended(self._because)
        finally:
            for waiting in (ended, asked):
                waiting.cancel()

    async def _restart(self) -> None:
        began = system.now()
        while True:
            await self._policy.app.wait_while_paused(self._because)
            decision = self._policy.decide()
            if isinstance(decision, FailOver):
                raise BackendError(self._section.app, "run", self._because)
            self._policy.begin(self._because, decision)
            # Gracefully, as it may still work for somebody; of one that has ended this ends what it has left.
            await self.end(self._because, graceful=True)
            await self._pause(decision)
            try:
                await self.start()
                await self.wait_ready()
            except BackendError as error:
                if self.running is not None:
                    raise  # it does not die: no second one beside it
                log.warning("app %s: %s", self._section.app, error)
                self._because = f"{error.step}: {error.problem}"
                continue
            self.restarts += 1
            self._because = ""
            self._ask.clear()
            self._policy.app.on_restarted(system.now() - began)
            return

    async def _pause(self, decision: RestartIn) -> None:
        until = system.now() + decision.delay
        while (left := until - system.now()) > 0:
            await asyncio.sleep(min(left, LOOK_SECONDS) if decision.beyond else left)
            if decision.beyond and isinstance(self._policy.decide(), FailOver):
                raise BackendError(self._section.app, "run", self._because)


__all__ = ["Program", "RestartPolicy", "Restarting"]
