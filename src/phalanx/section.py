"""One active section: the time in which this node runs an app's active work, from epoch to release.

The invariant: when :meth:`Section.run` returns, nothing of the section runs any more: no hook, no
process. Only then may the caller release the leader key. If that cannot be reached (a hook that does
not end, processes that do not die) ``run`` does not return; ``stuck`` is set, and the node must end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from phalanx import system
from phalanx.coord.election import Reign
from phalanx.decide.activation import Step, Undo, steps, undoing
from phalanx.decide.pause import Cause, ends_section
from phalanx.errors import AddressError, BackendError, HookFailed, PhalanxError
from phalanx.hooks import Hooks, HookStuck
from phalanx.ports import (
    SectionAddresses,
    SectionCalls,
    SectionContext,
    SectionDatabase,
    SectionEvents,
)
from phalanx.program import Program
from phalanx.types import Resource, Role

log = logging.getLogger("phalanx.section")


class Context(Protocol):
    """What the section needs of the object that hooks get."""

    cancelled_event: asyncio.Event
    ready_event: asyncio.Event
    is_cooperative: bool


class Section:
    """Runs one reign: activate, hold, stand down. ``fence()`` makes the end hard at any moment."""

    def __init__(
        self,
        reign: Reign,
        resources: SectionContext,
        hooks: Hooks,
        program: Program | None,
        context: Context,
        *,
        database: SectionDatabase | None = None,
        addresses: SectionAddresses | None = None,
        calls: SectionCalls | None = None,
        events: SectionEvents | None = None,
        fence_previous: Callable[[], Awaitable[None]] | None = None,
        on_active_timeout: float,
        on_passive_timeout: float,
        on_role: Callable[[Role], None],
        on_step: Callable[[str, float, str], None],
        paused: Callable[[], bool] = lambda: False,
        on_held: Callable[[str], None] = lambda problem: None,
        adopted: Sequence[Resource] = (),
    ) -> None:
        self.reign = reign
        self._resources, self._hooks, self.program, self._context = resources, hooks, program, context
        self._database, self._addresses, self._fence_previous = database, addresses, fence_previous
        self._calls, self._events = calls, events
        self._on_active_timeout, self._on_passive_timeout = on_active_timeout, on_passive_timeout
        self._on_role, self._on_step = on_role, on_step
        self._paused, self._on_held, self._again = paused, on_held, asyncio.Event()
        self._adopted_program = next((one for one in adopted if one.kind not in ("section", "vip")), None)
        self._adopted_addresses = [one for one in adopted if one.kind == "vip"]
        self.is_left = False
        """Whether its program was left running, for the node's next life."""
        self._hard = asyncio.Event()
        self._begun: list[Step] = []
        self.step, self.step_since = "", 0.0
        """The step of becoming active that is under way, and since when (Unix seconds); empty: none."""
        self.left_behind = ""
        """What a graceful end could not put into the log of the database, and why; empty: nothing."""
        self._active_hook: asyncio.Task[Any] | None = None
        self.failure: PhalanxError | None = None
        """Why the section failed by itself; None if somebody asked it to end."""
        self.active_since: float | None = None
        self.stuck = asyncio.Event()

    @property
    def steady_seconds(self) -> float:
        """How long it is active by now, or ready since its program was started the last time."""
        if self.active_since is None:
            return 0.0
        steady = self.program.steady_since if self.program is not None else self.active_since
        return system.now() - max(self.active_since, steady)

    @property
    def resource_id(self) -> str:
        """The id under which the keeper knows the section's code inside the node."""
        return f"{self._resources.app}.{self._resources.epoch}.hooks"

    def fence(self, reason: str) -> None:
        """End at once, without grace."""
        self.reign.end(reason)
        self._hard.set()

    def leave(self, reason: str) -> None:
        """End here without ending the program: the node ends in a pause, and the keeper has what runs on."""
        self.is_left = True
        self.reign.end(reason)

    def look(self) -> None:
        """A pause has begun or ended: judge again what has failed."""
        self._again.set()

    async def run(self) -> None:
        """From the first step to the end of everything."""
        try:
            await self._until(self._activate(), self.reign.ending.wait())
            if not self.reign.ending.is_set() and self.failure is None:
                self.active_since = system.now()
                self._on_role(Role.ACTIVE)
                await self._hold()
        finally:
            await self._see_to_the_end()

    async def _see_to_the_end(self) -> None:
        """Stand down, also when cancelled (then without grace): no section looks ended before it has."""
        ending = asyncio.create_task(self._stand_down(), name=f"{self._resources.app} stand down")
        cancelled = False
        while not ending.done():
            try:
                await asyncio.wait({ending})
            except asyncio.CancelledError:
                cancelled = True
                self._hard.set()
        if cancelled:
            raise asyncio.CancelledError
        ending.result()

    async def _until(self, work: Awaitable[None], end: Awaitable[Any]) -> None:
        """Do *work*, but cancel it when *end* comes first. What it raises is the section's failure."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(end)
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, PhalanxError):
            log.error("app %s: the section failed", self._resources.app, exc_info=error)
            error = BackendError(self._resources.app, "start", f"{type(error).__name__}: {error}")
        self.failure = error
        self.reign.end(str(error))

    # --- becoming active

    async def _activate(self) -> None:
        has_hooks = "on_active" in self._hooks or "on_passive" in self._hooks
        parts = {
            "has_backend": self.program is not None,
            "has_database": self._database is not None,
            "has_vip": self._addresses is not None,
            "has_calls": self._calls is not None,
            "has_events": self._events is not None,
            "needs_fence": self._fence_previous is not None,
        }
        for step in steps(has_hooks=has_hooks, **parts):
            self._begun.append(step)
            self.step, self.step_since = step, system.wall()
            began = system.now()
            match step:
                case Step.REGISTER:
                    resource = Resource(
                        "section", self.resource_id, self._resources.app, self._resources.epoch
                    )
                    await self._resources.register(resource)
                case Step.SEAL | Step.PROMOTE | Step.CAPTURE | Step.CAPTURED:
                    await self._take_database(step)
                case Step.FENCE:
                    assert self._fence_previous is not None
                    await self._fence_previous()
                case Step.SEAL_EVENTS:
                    assert self._events is not None
                    await self._events.seal(self._resources.epoch)
                case Step.VIP:
                    assert self._addresses is not None
                    await self._addresses.acquire(self._resources, self._adopted_addresses)
                case Step.BACKEND:
                    assert self.program is not None
                    if self._adopted_program is not None:
                        await self.program.adopt(self._adopted_program)
                    else:
                        await self.program.start()
                case Step.READY:
                    assert self.program is not None
                    await self.program.wait_ready()
                case Step.ON_ACTIVE:
                    await self._run_on_active()
                case Step.CALLS:
                    assert self._calls is not None
                    await self._calls.begin(self._resources.epoch, self._context)
            self._on_step(step, system.now() - began, "")
        self.step = ""

    async def _take_database(self, step: Step) -> None:
        database = self._database
        assert database is not None
        match step:
            case Step.SEAL:
                await database.seal(self._resources.epoch)
            case Step.PROMOTE:
                await database.promote()
            case Step.CAPTURE:
                await database.start_capture(self._resources)
            case _:
                await self._hold_until(database.wait_captured())

    async def _run_on_active(self) -> None:
        if "on_active" not in self._hooks:
            return
        async with self._hooks.turn:
            self._active_hook = hook = self._hooks.start("on_active", self._context)
            ready = asyncio.create_task(self._context.ready_event.wait())
            try:
                done, _ = await asyncio.wait(
                    {hook, ready}, timeout=self._on_active_timeout, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                ready.cancel()
        if hook.done():
            self._hooks.result("on_active", hook)
        elif not done:
            raise HookFailed(
                self._resources.app,
                "on_active",
                f"neither returned nor called ctx.ready() within {self._on_active_timeout:g} s",
            )

    # --- being active

    async def _hold(self) -> None:
        """Until somebody asks for the end, or the program is given up here, or the hook ends badly."""
        ending = asyncio.create_task(self.reign.ending.wait())
        hook = self._active_hook if self._active_hook is not None and not self._active_hook.done() else None
        kept = asyncio.create_task(self.program.keep()) if self.program is not None else None
        lost = asyncio.ensure_future(self._addresses.lost) if self._addresses is not None else None
        held = ""
        try:
            while not self.reign.ending.is_set():
                self._again.clear()
                problem = self._what_failed(hook, kept, lost)
                if problem is not None and ends_section(Cause.FAILED, paused=self._paused()):
                    self._fail(problem)
                    return
                if problem is not None and str(problem) != held:
                    held = str(problem)
                    self._on_held(held)
                again = asyncio.create_task(self._again.wait())
                waits: set[asyncio.Future[Any]] = {ending, again}
                waits |= {w for w in (hook, kept, lost) if w is not None and not w.done()}
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    again.cancel()
        finally:
            ending.cancel()
            if kept is not None:
                # To its end: a start that is under way leaves nothing behind, or is known to be running.
                kept.cancel()
                await asyncio.gather(kept, return_exceptions=True)

    def _what_failed(
        self,
        hook: asyncio.Task[Any] | None,
        kept: asyncio.Task[Any] | None,
        lost: asyncio.Future[AddressError] | None,
    ) -> BaseException | None:
        """What has failed by itself so far; None if nothing has, as when ``on_active`` has just returned."""
        if lost is not None and lost.done():
            return lost.result()
        if kept is not None and kept.done() and (error := kept.exception()) is not None:
            return error
        if hook is not None and hook.done():
            try:
                self._hooks.result("on_active", hook)
            except HookFailed as error:
                return error
        return None

    async def _hold_until(self, reached: Coroutine[Any, Any, None]) -> None:
        """The same while the last step of the activation is waited for, and until that at most."""
        step, holding = asyncio.create_task(reached), asyncio.create_task(self._hold())
        try:
            await asyncio.wait({step, holding}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (step, holding):
                if not task.done():
                    task.cancel()
            await asyncio.gather(step, holding, return_exceptions=True)
        if not step.cancelled():
            step.result()

    # --- standing down

    async def _stand_down(self) -> None:
        if self.is_left:
            if self.program is not None:
                self.program.leave()
            if self._addresses is not None:
                await self._addresses.leave()
            return
        self._on_role(Role.STANDING_DOWN)
        self._context.cancelled_event.set()
        if not (self._hard.is_set() or self.reign.deposed):
            await self._until(self._undo(graceful=True), self._hard.wait())
        while True:
            try:
                await self._hooks.end_left()
                await self._undo(graceful=False)
                return
            except PhalanxError as error:
                # The invariant: never "ended" while something runs. The keeper or the node's own end decide.
                log.critical("app %s: %s", self._resources.app, error)
                self._on_step("stuck", 0.0, str(error))
                self.stuck.set()
            await asyncio.sleep(0.2)

    async def _undo(self, *, graceful: bool) -> None:
        for undo in undoing(self._begun, graceful=graceful):
            began = system.now()
            problem = ""
            match undo:
                case Undo.END_CALLS:
                    assert self._calls is not None
                    await self._calls.end(graceful=graceful)
                case Undo.END_ON_ACTIVE:
                    await self._end_on_active(graceful)
                case Undo.ON_PASSIVE:
                    problem = await self._run_on_passive()
                case Undo.STOP_BACKEND:
                    assert self.program is not None
                    await self.program.end(self.reign.reason, graceful=graceful)
                case Undo.RELEASE_VIP:
                    assert self._addresses is not None
                    await self._addresses.release()
                case Undo.STOP_CAPTURE:
                    assert self._database is not None
                    self.left_behind = problem = await self._database.stop_capture(graceful=graceful)
                case Undo.UNREGISTER:
                    self._resources.unregister(self.resource_id)
            self._forget(undo)
            if undo is Undo.ON_PASSIVE and "on_passive" not in self._hooks:
                continue
            self._on_step(undo, system.now() - began, problem)

    def _forget(self, undo: Undo) -> None:
        undone: dict[Undo, tuple[Step, ...]] = {
            Undo.END_CALLS: (Step.CALLS,),
            Undo.ON_PASSIVE: (Step.ON_ACTIVE,),
            Undo.STOP_BACKEND: (Step.READY, Step.BACKEND),
            Undo.RELEASE_VIP: (Step.VIP,),
            Undo.UNREGISTER: (Step.REGISTER,),
            Undo.STOP_CAPTURE: (Step.CAPTURED, Step.CAPTURE, Step.PROMOTE, Step.SEAL),
        }
        self._begun = [step for step in self._begun if step not in undone.get(undo, ())]

    async def _end_on_active(self, graceful: bool) -> None:
        hook = self._active_hook
        if hook is None:
            return
        if not hook.done() and graceful and self._context.is_cooperative:
            # It watches ctx.cancelled, which is set: let it end in its own way.
            await asyncio.wait({hook}, timeout=self._on_passive_timeout)
        if not hook.done():
            await self._hooks.end("on_active", hook)
        self._active_hook = None

    async def _run_on_passive(self) -> str:
        try:
            await self._hooks.call("on_passive", self._context)
        except HookStuck:
            raise
        except HookFailed as error:
            return str(error)
        return ""
