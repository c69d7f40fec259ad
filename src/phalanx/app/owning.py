"""The hooks of a ring's partitions: side by side up to a bound, never two at once for one partition (G7).

For each partition that the node owns there is one task, from its begin to its end: ``on_own``, then the time
in which it is owned and calls to it are answered, then ``on_release``. Only when no code of it runs any more
is the partition given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks
from phalanx.decide.backoff import Backoff
from phalanx.errors import HookFailed, PhalanxError, SessionLost, StartError
from phalanx.ports import Fence, SectionCalls

log = logging.getLogger("phalanx.hooks")

CANCEL_SECONDS = 1.0
"""After so long a hook that was cancelled and goes on is reported as stuck."""

RETRY_SECONDS = 0.2


class PartitionContext:
    """What ``on_own`` and ``on_release`` get besides the partition, and handlers as ``ctx.active``.

    Writes through ``kv`` and ``lock`` carry the partition's epoch; once another node owns the partition the
    server refuses them (``Fenced``).
    """

    def __init__(
        self,
        app: str,
        node: str,
        partition: int,
        fence: Fence,
        kv: AppKV | None = None,
        locks: Locks | None = None,
    ) -> None:
        self.app, self.node, self.partition, self.fence = app, node, partition, fence
        self._kv, self._locks = kv, locks
        self.cancelled = asyncio.Event()
        """Set when the partition has to be given back."""

    @property
    def epoch(self) -> int:
        """The partition's fencing token: it only ever grows."""
        return self.fence.revision

    @property
    def kv(self) -> AppKV:
        """The app's KV, with writes that are fenced by the partition's epoch."""
        if self._kv is None:
            raise StartError(f"app {self.app!r} has no KV here", "use it in a running platform")
        return self._kv

    def lock(self, name: str, *, timeout: float = 10.0) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held under the partition's epoch. *timeout* in seconds."""
        if self._locks is None:
            raise StartError(f"app {self.app!r} has no locks here", "use them in a running platform")
        return self._locks.lock(name, timeout=timeout)


PartitionHook = Callable[[int, Any], Awaitable[None]]


class OwnedPartitions(Protocol):
    """What the hooks need of the ring (:class:`phalanx.coord.ring.RingPartitions`)."""

    def ended(self, partition: int) -> None: ...
    def set_aside(self, partition: int, aside: bool) -> None: ...


class Presence(Protocol):
    """That partitions are owned here, as the keeper knows it: from the first to the last."""

    async def enter(self) -> None:
        """One more begins. Raises SessionLost."""
        ...

    def leave(self) -> None:
        """Nothing of one that had entered runs any more."""
        ...


class _Alone:
    """A presence that nobody is told of."""

    async def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass


async def _not_prepared(partition: int) -> None:
    pass


class _Tenure:
    """One time of owning one partition."""

    def __init__(self, context: PartitionContext, calls: SectionCalls | None) -> None:
        self.context, self.calls = context, calls
        self.begun = self.ready = self.is_stuck = False
        self.has_calls = False
        self.hard = asyncio.Event()
        self.task: asyncio.Task[None]

    @property
    def ending(self) -> asyncio.Event:
        return self.context.cancelled


class PartitionHooks:
    """Runs the hooks of all partitions of one app on one node.

    *most_at_once*: so many hooks run side by side, others wait for their turn. *own_seconds* and
    *release_seconds*: the deadline of each. *context* makes what they get; *calls* what answers the calls
    to a partition while it is owned. *prepare* returns when the next owner of a partition is ready for it, or
    need not be waited for. *on_failed* is told of the partition, and of what was wrong; *on_stuck* of one
    whose code does not end; *on_change* that another partition is ready, or is so no longer.
    """

    def __init__(
        self,
        app: str,
        node: str,
        ring: OwnedPartitions,
        *,
        on_own: PartitionHook | None = None,
        on_release: PartitionHook | None = None,
        own_seconds: float = 30.0,
        release_seconds: float = 10.0,
        most_at_once: int = 16,
        retry: Backoff | None = None,
        context: Callable[[int, Fence], PartitionContext] | None = None,
        calls: Callable[[int], SectionCalls | None] = lambda partition: None,
        prepare: Callable[[int], Awaitable[None]] = _not_prepared,
        presence: Presence | None = None,
        on_failed: Callable[[int, HookFailed], None] = lambda partition, error: None,
        on_stuck: Callable[[int], None] = lambda partition: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._app, self._node, self._ring = app, node, ring
        self._on_own, self._on_release = on_own, on_release
        self._own_seconds, self._release_seconds = own_seconds, release_seconds
        self._turns = asyncio.Semaphore(most_at_once)
        self._retry, self._on_failed = retry or Backoff(), on_failed
        self._context = context or self._bare_context
        self._calls, self._prepare = calls, prepare
        self._presence: Presence = presence if presence is not None else _Alone()
        self._on_stuck, self._on_change = on_stuck, on_change
        self._tenures: dict[int, _Tenure] = {}
        self._failures: dict[int, int] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._none = asyncio.Event()
        self._none.set()

    def _bare_context(self, partition: int, fence: Fence) -> PartitionContext:
        return PartitionContext(self._app, self._node, partition, fence)

    # --- what is so

    @property
    def ready(self) -> list[int]:
        """The partitions whose ``on_own`` has returned, and that are not being given back."""
        return sorted(n for n, t in self._tenures.items() if t.ready and not t.ending.is_set())

    @property
    def has_ready(self) -> bool:
        """Whether :attr:`ready` has any."""
        return any(t.ready and not t.ending.is_set() for t in self._tenures.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing of any partition runs here."""
        return not self._tenures

    @property
    def unfinished(self) -> int:
        """How many partitions have code here that was to end and has not."""
        return sum(1 for tenure in self._tenures.values() if tenure.is_stuck)

    def __len__(self) -> int:
        return len(self._tenures)

    def is_stuck(self, partition: int) -> bool:
        """Whether code of *partition* does not end."""
        return partition in self._tenures and self._tenures[partition].is_stuck

    async def wait_empty(self) -> None:
        """Wait until nothing of any partition runs here."""
        await self._none.wait()

    # --- what happens

    def begin(self, partition: int, fence: Fence) -> None:
        """The node owns *partition* from now on."""
        assert partition not in self._tenures, "the ring begins with a partition when the last time has ended"
        tenure = _Tenure(self._context(partition, fence), self._calls(partition))
        self._tenures[partition] = tenure
        self._none.clear()
        tenure.task = asyncio.create_task(self._run(partition, tenure), name=f"{self._app} partition")
        tenure.task.add_done_callback(self._look_how_it_ended)

    def end(self, partition: int, reason: str, hard: bool) -> None:
        """*partition* is to be given back; *hard*: at once, so ``on_release`` is not run, or is cancelled."""
        tenure = self._tenures[partition]
        log.debug("app %s: partition %d ends: %s", self._app, partition, reason)
        tenure.ending.set()
        if hard:
            tenure.hard.set()
        self._on_change()

    def end_all(self) -> None:
        """End all at once."""
        for tenure in self._tenures.values():
            tenure.ending.set()
            tenure.hard.set()

    async def close(self) -> None:
        """End what still runs at once, and see its end."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = [tenure.task for tenure in self._tenures.values()]
        self.end_all()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one partition

    async def _run(self, partition: int, tenure: _Tenure) -> None:
        try:
            await self._presence.enter()
        except SessionLost as error:
            log.warning("app %s: partition %d does not begin: %s", self._app, partition, error)
            await tenure.ending.wait()
        except PhalanxError as error:
            # The keeper cannot take note of it: its disk is full. Another node may be able to.
            self._report("on_own", tenure, f"cannot begin: {error}")
            if not tenure.ending.is_set():
                self._step_aside(partition)
            await tenure.ending.wait()
        else:
            await self._live(partition, tenure)
            self._presence.leave()
        del self._tenures[partition]
        if not self._tenures:
            self._none.set()
        self._ring.ended(partition)
        self._on_change()

    async def _live(self, partition: int, tenure: _Tenure) -> None:
        if await self._call("on_own", self._on_own, tenure, self._own_seconds, tenure.ending):
            await self._begin_calls(tenure)
            tenure.ready = True
            self._failures.pop(partition, None)
            self._on_change()
        elif not tenure.ending.is_set():
            self._step_aside(partition)
        await tenure.ending.wait()
        if tenure.ready and not tenure.hard.is_set():
            await self._until(self._prepare(partition), tenure.hard)
        await self._end_calls(tenure)
        if tenure.begun and not tenure.hard.is_set():
            await self._call("on_release", self._on_release, tenure, self._release_seconds, tenure.hard)

    @staticmethod
    async def _until(work: Awaitable[None], stop: asyncio.Event) -> None:
        """Do *work*, but cancel it when *stop* is set first."""
        task, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (task, stopping):
                each.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    async def _begin_calls(self, tenure: _Tenure) -> None:
        if tenure.calls is None:
            return
        while not tenure.ending.is_set():
            tenure.has_calls = True
            try:
                await tenure.calls.begin(tenure.context.epoch, tenure.context)
            except PhalanxError as error:
                what = f"calls to partition {tenure.context.partition}"
                log.warning("app %s: %s cannot be answered yet: %s", self._app, what, error)
                await self._until(asyncio.sleep(RETRY_SECONDS), tenure.ending)
            else:
                return

    async def _end_calls(self, tenure: _Tenure) -> None:
        """Returns only when no call runs any more."""
        while tenure.calls is not None and tenure.has_calls:
            try:
                await tenure.calls.end(graceful=not tenure.hard.is_set())
            except PhalanxError as error:
                log.critical("app %s: %s", self._app, error)
                self._note_stuck(tenure)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                tenure.has_calls = tenure.is_stuck = False

    async def _call(
        self, name: str, hook: PartitionHook | None, tenure: _Tenure, seconds: float, stop: asyncio.Event
    ) -> bool:
        """Run *hook* until it ends, or for *seconds*, or until *stop*; whether it did all it had to.

        Returns only when no code of it runs any more, however long that takes.
        """
        if hook is None:
            tenure.begun = True
            return True
        stopping = asyncio.create_task(stop.wait())
        turn = asyncio.create_task(self._turns.acquire())
        try:
            await asyncio.wait({turn, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done() or stop.is_set():
                return False
            tenure.begun = True
            running = asyncio.ensure_future(hook(tenure.context.partition, tenure.context))
            await asyncio.wait({running, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            overran = not running.done() and not stop.is_set()
            if not running.done():
                await self._cancel(name, tenure, running)
            return self._judge(
                name, tenure, running, f"overran its deadline of {seconds:g} s" if overran else ""
            )
        finally:
            stopping.cancel()
            turn.cancel()
            if turn.done() and not turn.cancelled():
                self._turns.release()

    async def _cancel(self, name: str, tenure: _Tenure, running: asyncio.Future[None]) -> None:
        """See the end of *running*. The session's deadline, not we, decides how long that may take."""
        while not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=CANCEL_SECONDS)
            if not running.done() and not tenure.is_stuck:
                problem = f"does not end, {CANCEL_SECONDS:g} s after it was cancelled"
                self._report(name, tenure, problem)
                self._note_stuck(tenure)
        tenure.is_stuck = False

    def _note_stuck(self, tenure: _Tenure) -> None:
        if not tenure.is_stuck:
            tenure.is_stuck = True
            self._on_stuck(tenure.context.partition)

    def _judge(self, name: str, tenure: _Tenure, ended: asyncio.Future[None], problem: str) -> bool:
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            log.error("app %s: %s of partition %d", self._app, name, tenure.context.partition, exc_info=error)
            problem = problem or f"failed: {type(error).__name__}: {error}"
        elif ended.cancelled() and not problem and not tenure.ending.is_set():
            problem = "was cancelled"
        if problem:
            self._report(name, tenure, problem)
        return not problem and not ended.cancelled()

    def _report(self, name: str, tenure: _Tenure, problem: str) -> None:
        partition = tenure.context.partition
        self._on_failed(partition, HookFailed(self._app, name, f"of partition {partition} {problem}"))

    def _step_aside(self, partition: int) -> None:
        """Leave it alone for a while that grows; then the plan decides again."""
        self._failures[partition] = count = self._failures.get(partition, 0) + 1
        self._ring.set_aside(partition, True)
        with contextlib.suppress(KeyError):
            self._timers.pop(partition).cancel()
        loop = asyncio.get_running_loop()
        self._timers[partition] = loop.call_later(self._retry.delay(count), self._try_again, partition)

    def _try_again(self, partition: int) -> None:
        del self._timers[partition]
        self._ring.set_aside(partition, False)

    def _look_how_it_ended(self, task: asyncio.Task[None]) -> None:
        """A bug of ours leaves the partition where it is: it is not given back, and somebody hears of it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s failed; it stays here until the node ends", task.get_name(), exc_info=error)
