"""One start of a container: followed by the engine's word and by the kernel's, ended for certain.

The invariant is the process backend's: from before the start until nothing of it runs, the keeper has the
container's id, by which it can be ended and found. While the engine is away (it restarts, hangs, or is gone)
a container that ran is taken to run: with live-restore it does, and a killed engine leaves them running too.
The kernel tells when its first process ends, where that can be seen from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from phalanx import child, containers, system
from phalanx.aio import wait_at_most
from phalanx.backends import container_output, readiness
from phalanx.backends.abandoning import until_gone
from phalanx.backends.engine import Engine, EngineError, Inspection, State
from phalanx.config import Docker
from phalanx.errors import BackendError
from phalanx.ports import SectionContext
from phalanx.types import Health, ProgramState, ProgramStatus, Resource

log = logging.getLogger("phalanx.backend")

RECONNECT_SECONDS = 0.5
LOST_SECONDS = 30.0
"""A container that cannot be seen from here is given up when its engine has been silent for that long."""

_EXIT_CODE_SECONDS = 1.0
"""How long the engine may take to tell the exit code of a process whose end the kernel has told."""
_LAST_OUTPUT_SECONDS = 0.5
_HEALTH = {"healthy": Health.HEALTHY, "unhealthy": Health.UNHEALTHY}


class Container:
    """Implements ``ports.Running``: a container that is there, and not yet started.

    *name*: what people call it. *remove*: it was made for this start, and goes with it, as does the client
    of the engine. *keep* gets each line of output, *on_gone* the id once nothing of it runs.
    """

    def __init__(
        self,
        engine: Engine,
        config: Docker,
        section: SectionContext,
        container: str,
        name: str,
        *,
        remove: bool,
        keep: Callable[[str], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._engine, self._config, self._section = engine, config, section
        self._app, self.id, self._name = section.app, container, name
        self._target = containers.Target(engine.socket, container, remove)
        self._tasks: list[asyncio.Task[None]] = []
        self._on_gone = on_gone
        self._output = container_output.Output(engine, container, section.app, keep)
        self._stop_watch: Callable[[], None] | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._exited = asyncio.Event()
        self._process_gone = asyncio.Event()
        self._start_sent = self._asked_to_end = self._gone = False
        self._ending: asyncio.Task[containers.Report] | None = None
        self._health = ""
        self._health_changed = asyncio.Event()
        self._stop_signal = ""
        self._since = 0.0
        self._detail = ""
        self._last_seen = "no answer yet"

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done when the container has ended by itself: how. Cancelling it does no harm to others who wait."""
        return asyncio.shield(self._ended)

    def status(self) -> ProgramStatus:
        """See ``ports.Running.status``."""
        if self._gone or self._exited.is_set():
            state = ProgramState.ENDED
        elif self._asked_to_end:
            state = ProgramState.STOPPING
        else:
            state = ProgramState.RUNNING if self._since else ProgramState.STARTING
        detail = self._detail or (f"health: {self._health}" if self._health else "")
        return ProgramStatus(f"container {self.id[:12]}", state, self._since, detail=detail)

    # --- start

    async def start(self) -> None:
        """Register, start, register with its process. The caller abandons it if that fails."""
        await self._register()
        asked = system.wall()
        # To its end even if cancelled: the engine may start it all the same.
        await child.finish(asyncio.create_task(self._start(), name=f"{self._app} backend, starting"))
        await self._follow(0.0 if self._target.remove else asked)
        log.info("app %s: started container %.12s", self._app, self.id, extra={"app": self._app})

    async def adopt(self, known: containers.Target) -> bool:
        """Take up what runs already. False, an error or a cancellation: only after nothing of it runs.

        *known*: with its first process, by which it can be ended without the engine.
        """
        self._target, self._start_sent = known, True
        try:
            runs = await self._runs_on()
            if runs:
                await self._follow(system.wall())
                log.info("app %s: took up container %.12s", self._app, self.id, extra={"app": self._app})
            else:
                await self.kill()  # what is left of it
        except BaseException:
            await child.finish(asyncio.create_task(self.abandon(), name=f"{self._app} backend, giving up"))
            raise
        return runs

    async def _runs_on(self) -> bool:
        """Whether it runs; an engine that is away may come back. Raises BackendError."""
        deadline = system.now() + LOST_SECONDS
        while True:
            try:
                found = await self._engine.inspect(self.id)
                return found is not None and found.state.runs
            except EngineError as error:
                if system.now() > deadline:
                    problem = (
                        f"the Docker Engine does not tell the state of container {self.id[:12]}: {error}"
                    )
                    raise BackendError(self._app, "start", problem, "look at the Docker Engine") from error
                log.warning("app %s: container %.12s is not taken up yet: %s", self._app, self.id, error)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _follow(self, output_since: float) -> None:
        """Take note of what runs, tell the keeper, and watch it from now on. Raises BackendError.

        *output_since*: Unix time; an existing container has output of earlier starts.
        """
        found = await self._inspect()
        self._note_process(found.state.pid)
        await self._register()
        self._since = system.wall()
        self._stop_signal = found.config.stop_signal or "SIGTERM"
        if found.state.health_status:
            await self._note_health(found.state.health_status)
            self._spawn(self._follow_health(), "health")
        self._spawn(self._output.follow(output_since, self._exited), "output")
        self._spawn(self._watch(), "watch")

    async def _register(self) -> None:
        resource = Resource(
            "container",
            self.id,
            self._app,
            self._section.epoch,
            start_time=self._target.start_time,
            details={**self._target.details(), "name": self._name},
            adoptable=True,
        )
        await self._section.register(resource)

    async def _start(self) -> None:
        self._start_sent = True
        try:
            await self._engine.start(self.id)
        except EngineError as error:
            raise BackendError(self._app, "start", *_start_failed(error)) from error

    async def _inspect(self) -> Inspection:
        try:
            found = await self._engine.inspect(self.id)
        except EngineError as error:
            raise BackendError(
                self._app, "start", f"the Docker Engine does not tell its state: {error}"
            ) from error
        if found is None:
            raise BackendError(self._app, "start", f"somebody removed its container {self.id[:12]}")
        return found

    def _note_process(self, pid: int) -> None:
        """Watch its first process, if this host sees the very one that the engine means."""
        if pid <= 0:
            return
        first = system.ProcessRef.of(pid)
        if first not in containers.find(self.id):
            log.debug("app %s: the processes of container %.12s are not to be seen", self._app, self.id)
            return
        self._target = self._target._replace(pid=pid, start_time=first.start_time)
        self._stop_watch = system.watch_exit(pid, self._process_gone.set)

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"{self._app} container {what}"))

    # --- ready

    async def wait_ready(self) -> None:
        """By the declared check, else the image's HEALTHCHECK. See ``ports.Running.wait_ready``."""
        if self._config.ready is not None:
            await self._until_ready(readiness.poll(self._config.ready, self._not_yet))
        elif self._health:
            await self._until_ready(self._wait_healthy())

    async def _until_ready(self, passing: Coroutine[Any, Any, None]) -> None:
        outcome = await readiness.wait(self._app, passing, self._exited.wait(), self._config.ready_timeout)
        if self._exited.is_set():
            await self._last_output()
            how = self._ended.result() if self._ended.done() else "ended"
            said = self._output.last_line[:300]
            problem = f"the program {how} before it was ready" + (f": {said}" if said else "")
            raise BackendError(self._app, "ready", problem, "its output is in the log")
        if outcome.error is not None:
            raise outcome.error
        if not outcome.passed:
            problem = f"not ready within {self._config.ready_timeout:g} s: {self._last_seen}"
            remedy = "correct the ready check, or raise ready_timeout"
            raise BackendError(self._app, "ready", problem, remedy)

    def _not_yet(self, detail: str) -> None:
        self._last_seen = detail

    async def _wait_healthy(self) -> None:
        while self._health != "healthy":
            self._last_seen = f"its HEALTHCHECK says {self._health}"
            if self._health == "unhealthy":
                said = await self._health_output()
                problem = f"its HEALTHCHECK says unhealthy{said}"
                raise BackendError(self._app, "ready", problem, "look at the image's HEALTHCHECK")
            self._health_changed.clear()
            await self._health_changed.wait()

    # --- following

    async def _watch(self) -> None:
        """Until it has ended. The engine's wait request tells, or the kernel, or a look after a pause."""
        silent_since: float | None = None
        while True:
            how = await self._how_ended()
            if how is not None:
                self._on_exit(how)
                return
            now = system.now()
            if silent_since is None or self._detail == "":
                silent_since = now
                self._detail = "the Docker Engine does not answer"
                log.warning(
                    "app %s: the Docker Engine does not answer; container %.12s is taken to run on",
                    self._app,
                    self.id,
                )
            if not self._target.pid and now - silent_since > LOST_SECONDS:
                self._on_exit(f"cannot be seen: the Docker Engine has not answered for {LOST_SECONDS:g} s")
                return
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _how_ended(self) -> str | None:
        """Wait for its end; None when the engine can't be asked at present."""
        asking = asyncio.create_task(self._ask_how())
        seeing = asyncio.create_task(self._process_gone.wait())
        try:
            await asyncio.wait({asking, seeing}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                await asyncio.wait({asking}, timeout=_EXIT_CODE_SECONDS)
        finally:
            for task in (asking, seeing):
                task.cancel()
            answer = (await asyncio.gather(asking, seeing, return_exceptions=True))[0]
        if isinstance(answer, str):
            return answer
        if self._process_gone.is_set():
            return "ended; the Docker Engine does not say how"
        return None

    async def _ask_how(self) -> str:
        """Raises EngineError."""
        await self._engine.version()
        if self._detail:
            self._detail = ""
            log.info("app %s: the Docker Engine answers again", self._app)
        try:
            await self._engine.wait(self.id)
            found = await self._engine.inspect(self.id)
        except EngineError as error:
            if error.status != 404:
                raise
            found = None
        if found is None:
            return "was removed by somebody"
        if found.state.runs:  # the engine said so because it was ending itself
            raise EngineError(0, "it runs on")
        return how_ended(found.state)

    def _on_exit(self, how: str) -> None:
        self._exited.set()
        if not self._asked_to_end and not self._ended.done():
            self._ended.set_result(how)

    async def _follow_health(self) -> None:
        """An event only says when to look: it may be one that is told again, or of an earlier start."""
        since = system.wall() - 2  # nothing is missed between a look and the subscription
        while not self._exited.is_set():
            async with contextlib.aclosing(self._engine.health(self.id, since)) as changes:
                async for _ in changes:
                    await self._look_at_health()
            await asyncio.sleep(RECONNECT_SECONDS)
            since = system.wall() - 2
            await self._look_at_health()

    async def _look_at_health(self) -> None:
        """An engine that does not tell is asked again until it does."""
        while not self._exited.is_set():
            with contextlib.suppress(EngineError):
                if found := await self._engine.inspect(self.id):
                    await self._note_health(found.state.health_status)
                return
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _note_health(self, health: str) -> None:
        if not health or health == self._health:
            return
        before, self._health = self._health, health
        self._health_changed.set()
        said = ""
        if health == "unhealthy":
            said = await self._health_output()
            log.warning("app %s: container %.12s: its HEALTHCHECK says unhealthy%s", self._app, self.id, said)
        elif before:
            log.info("app %s: container %.12s is %s", self._app, self.id, health)
        # What is being ended is not ill, and its successor must not be taken for it.
        if self._config.follow_health and not self._asked_to_end and not self._exited.is_set():
            detail = f"its HEALTHCHECK says {health}{said}"
            self._section.on_health(_HEALTH.get(health, Health.UNKNOWN), detail)

    async def _health_output(self) -> str:
        """What the HEALTHCHECK has printed last; empty if that is not to be had."""
        with contextlib.suppress(EngineError):
            if found := await self._engine.inspect(self.id):
                log_of = found.state.health.log if found.state.health else None
                if log_of and (said := log_of[-1].output.strip()):
                    return f": {said.splitlines()[-1][:200]}"
        return ""

    # --- end

    async def stop(self, reason: str) -> None:
        """See ``ports.Running.stop``."""
        if not self._gone and not self._exited.is_set():
            await self._end_gracefully(reason)
        await self._end("stop")

    async def _end_gracefully(self, reason: str) -> None:
        if not self._asked_to_end:  # many programs take a second signal for "without any care"
            self._asked_to_end = True
            declared = self._config.stop_signal
            name = f"SIG{declared}" if declared else self._stop_signal
            log.info("app %s: stopping container %.12s with %s: %s", self._app, self.id, name, reason)
            if not self._signal_process(name):
                try:
                    await self._engine.signal(self.id, name)
                except EngineError as error:
                    if not (self._exited.is_set() or error.status == 409):  # 409: it does not run
                        log.warning("app %s: its container got no %s: %s", self._app, name, error)
                        return
        if not await wait_at_most(self._exited, self._config.stop_timeout):
            hint = (
                "" if self._config.init or not self._config.image else "; see init in docs/configuration.md"
            )
            log.warning(
                "app %s: still running %g s after its stop signal, killing it%s",
                self._app,
                self._config.stop_timeout,
                hint,
            )

    def _signal_process(self, name: str) -> bool:
        """Send its first process a signal, as the engine would; False if that can't be from here.

        The engine is asked only then: one that hangs must not cost the program its grace.
        """
        first = system.ProcessRef(self._target.pid, self._target.start_time)
        number = int(name) if name.isdecimal() else getattr(signal, name, None)
        if not self._target.pid or number is None or not first.alive():
            return False
        with contextlib.suppress(OSError):
            os.kill(first.pid, number)
            return True
        return False

    async def kill(self) -> None:
        """See ``ports.Running.kill``. A cancellation is raised only after the end."""
        await self._end("kill")

    async def _end(self, step: str) -> None:
        self._asked_to_end = True
        if self._gone:
            return
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._see_to_its_end(), name=f"{self._app} backend, killing")
        report = await child.finish(self._ending)
        if not report.gone:
            problem = f"container {self.id[:12]} does not end: {report.problem}"
            remedy = "look at the Docker Engine, and at the container's processes with ps"
            raise BackendError(self._app, step, problem, remedy)

    async def _see_to_its_end(self) -> containers.Report:
        """Kill it and see that nothing of it runs; only then it is taken back from the keeper."""
        if self._exited.is_set() and self._tasks:
            await self._last_output()  # goes with the container
        report = await child.in_thread(partial(containers.end, self._target))
        if not report.gone:
            return report
        if report.problem:
            log.error("app %s: container %.12s has ended, but: %s", self._app, self.id, report.problem)
        log.info("app %s: container %.12s has ended", self._app, self.id, extra={"app": self._app})
        self._gone = True
        self._exited.set()
        self._on_gone(self.id)
        self._section.unregister(self.id)
        await self._close()
        return report

    async def _last_output(self) -> None:
        await self._output.finish(_LAST_OUTPUT_SECONDS)

    async def let_go(self) -> None:
        """Follow it no longer, whatever it does."""
        self._on_gone(self.id)
        await self._close()

    async def _close(self) -> None:
        if self._stop_watch is not None:
            self._stop_watch()
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("app %s: following its container failed", self._app, exc_info=outcome)
        await self._engine.close()

    async def abandon(self) -> None:
        """End what a failed start has left, however long that takes. What never ran need not be gone."""
        await until_gone(self._app, self._kill_what_ran)

    async def _kill_what_ran(self) -> None:
        try:
            await self.kill()
        except BackendError as error:
            if self._start_sent:
                raise
            log.error("%s; it never ran, and is removed at the next start", error)
            self._on_gone(self.id)
            self._section.unregister(self.id)
            await self._close()


# --- words


def how_ended(state: State) -> str:
    """How a container that does not run ended."""
    text = f"exited with code {state.exit_code}"
    if state.oom_killed:
        return f"{text}: killed for want of memory"
    if 128 < state.exit_code <= 128 + 64:
        with contextlib.suppress(ValueError):
            text += f", as if killed by {signal.Signals(state.exit_code - 128).name}"
    return f"{text}: {state.error}" if state.error else text


def _start_failed(error: EngineError) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    text = error.message
    if "already in use" in text or "already allocated" in text:
        return f"a port that it publishes is in use: {text}", "see who has it with ss -ltnp, or change ports"
    if "executable file not found" in text or "no such file" in text.lower():
        return f"its command cannot be run: {text}", "correct command, or look into the image"
    if error.status == 0:
        return f"the Docker Engine did not start it: {text}", "look at the Docker Engine"
    return text, "try it with docker run"
