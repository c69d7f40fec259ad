"""Users' hooks of one app on one node: never two at once, each with a deadline, sync or async.

Synchronous hooks run in one thread of the app's own, so that they cannot block the node. A thread
cannot be cancelled: a synchronous hook that overruns is reported as *stuck*, and as long as it runs the
section that it belongs to has not ended (see section.py for what follows).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from phalanx import system
from phalanx.config import HookTimeouts
from phalanx.errors import ConfigError, HookFailed

log = logging.getLogger("phalanx.hooks")

CANCEL_SECONDS = 1.0
"""How long an async hook may take to end after it was cancelled."""


class HookStuck(HookFailed):
    """A hook overran its deadline and does not end. Only the end of the process ends it."""


Hook = Callable[..., Any]


class Hooks:
    """The registered hooks of one app, and the rule that only one runs at a time."""

    def __init__(self, app: str, timeouts: HookTimeouts, on_run: Callable[[str, float], None]) -> None:
        self._app, self._timeouts, self._on_run = app, timeouts, on_run
        self._hooks: dict[str, Hook] = {}
        self._turn = asyncio.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._left: dict[asyncio.Task[Any], str] = {}
        self._running: dict[asyncio.Task[Any], str] = {}

    def add(self, name: str, function: Hook) -> None:
        """Register *function*. Raises ConfigError if the app has one already, or its parameters are wrong."""
        key = f"apps.{self._app}.{name}"
        if name in self._hooks:
            raise ConfigError(key, function, "the app has this hook already", "call both from one function")
        if not callable(function):
            raise ConfigError(key, function, "not a function", "decorate a function with it")
        _check_parameters(key, function)
        self._hooks[name] = function

    def __contains__(self, name: str) -> bool:
        return name in self._hooks

    def function(self, name: str) -> Hook:
        """The registered hook."""
        return self._hooks[name]

    @property
    def turn(self) -> asyncio.Lock:
        """Held while a hook runs. First come, first served."""
        return self._turn

    @property
    def unfinished(self) -> tuple[str, ...]:
        """The hooks that have begun and not ended: running in their time, or left behind as stuck."""
        return tuple(self._running.values())

    async def call(self, name: str, argument: object) -> None:
        """Run the hook within its deadline. Raises HookFailed, HookStuck. Nothing to do if there is none."""
        if name not in self._hooks:
            return
        async with self._turn:
            began = system.now()
            try:
                await self.bounded(name, self.start(name, argument), float(getattr(self._timeouts, name)))
            finally:
                self._on_run(name, system.now() - began)

    def start(self, name: str, argument: object) -> asyncio.Task[Any]:
        """Begin the hook as a task; the caller sees to its end."""
        function = self._hooks[name]
        call = functools.partial(function, *((argument,) if _takes_argument(function) else ()))
        work = call() if _is_async(function) else self._in_thread(call)
        task: asyncio.Task[Any] = asyncio.create_task(work, name=f"{self._app} {name}")
        self._running[task] = name
        task.add_done_callback(self._running.pop)
        return task

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, f"phalanx-{self._app}")
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread goes on, whatever we do and however often we are cancelled: the task must not look
            # ended before it has.
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    async def bounded(self, name: str, task: asyncio.Task[Any], seconds: float) -> None:
        """Wait for *task* within *seconds*; cancel it if it overruns, or if the caller is cancelled."""
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            # Whoever cancelled must get its cancellation; what is stuck stays on record.
            try:
                await self.end(name, task)
            except HookStuck as error:
                log.critical("%s", error)
            raise
        if not done:
            await self.end(name, task)
            raise HookFailed(self._app, name, f"overran its deadline of {seconds:g} s and was cancelled")
        self.result(name, task)

    def result(self, name: str, task: asyncio.Task[Any]) -> None:
        """Raise HookFailed if the ended *task* failed."""
        if task.cancelled():
            raise HookFailed(self._app, name, "was cancelled")
        if (error := task.exception()) is not None:
            log.error("app %s: hook %s failed", self._app, name, exc_info=error)
            raise HookFailed(self._app, name, f"failed: {type(error).__name__}: {error}") from error

    async def end(self, name: str, task: asyncio.Task[Any], seconds: float = CANCEL_SECONDS) -> None:
        """Cancel *task* and see its end. Raises HookStuck when it goes on."""
        task.cancel()
        self._left[task] = name
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise HookStuck(self._app, name, f"does not end, {seconds:g} s after it was cancelled")
        self._left.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("app %s: hook %s failed while it was ended", self._app, name, exc_info=error)

    async def end_left(self) -> None:
        """Make sure that no hook which did not end goes on. Raises HookStuck if one does."""
        for task, name in list(self._left.items()):
            await self.end(name, task)

    def close(self) -> None:
        """Let go of the thread. A hook that is stuck in it is left behind."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None


def _is_async(function: Hook) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def _parameters(function: Hook) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def _takes_argument(function: Hook) -> bool:
    every = inspect.signature(function).parameters.values()
    return bool(_parameters(function)) or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in every)


def _check_parameters(key: str, function: Hook) -> None:
    needed = [p for p in _parameters(function) if p.default is inspect.Parameter.empty]
    keywords = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty
    ]
    if len(needed) > 1 or keywords:
        raise ConfigError(key, function, "needs more than one argument", "a hook takes one (ctx) or none")
