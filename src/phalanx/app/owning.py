"""The hooks of a ring's partitions: side by side up to a bound, never two at once for one partition (G7).

For each partition that the node owns there is one task, from its begin to its end: ``on_own``, then the time
in which it is owned, then ``on_release``. Only when no code of it runs any more is the partition given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from phalanx.decide.backoff import Backoff
from phalanx.errors import HookFailed
from phalanx.ports import Fence

log = logging.getLogger("phalanx.hooks")

CANCEL_SECONDS = 1.0
"""After so long a hook that was cancelled and goes on is reported as stuck."""


class PartitionContext:
    """What ``on_own`` and ``on_release`` get besides the partition: its epoch, the fence for its writes."""

    def __init__(self, app: str, node: str, partition: int, fence: Fence) -> None:
        self.app, self.node, self.partition, self.fence = app, node, partition, fence
        self.cancelled = asyncio.Event()
        """Set when the partition has to be given back."""

    @property
    def epoch(self) -> int:
        """The partition's fencing token: it only ever grows."""
        return self.fence.revision


PartitionHook = Callable[[int, PartitionContext], Awaitable[None]]


class OwnedPartitions(Protocol):
    """What the hooks need of the ring (:class:`phalanx.coord.ring.RingPartitions`)."""

    def ended(self, partition: int) -> None: ...
    def set_aside(self, partition: int, aside: bool) -> None: ...


class _Tenure:
    """One time of owning one partition."""

    def __init__(self, context: PartitionContext) -> None:
        self.context = context
        self.begun = self.ready = False
        self.hard = asyncio.Event()
        self.task: asyncio.Task[None]

    @property
    def ending(self) -> asyncio.Event:
        return self.context.cancelled


class PartitionHooks:
    """Runs the hooks of all partitions of one app on one node.

    *most_at_once*: so many hooks run side by side, others wait for their turn. *own_seconds* and
    *release_seconds*: the deadline of each. *on_failed* is told of the partition, and of what was wrong.
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
        on_failed: Callable[[int, HookFailed], None] = lambda partition, error: None,
    ) -> None:
        self._app, self._node, self._ring = app, node, ring
        self._on_own, self._on_release = on_own, on_release
        self._own_seconds, self._release_seconds = own_seconds, release_seconds
        self._turns = asyncio.Semaphore(most_at_once)
        self._retry, self._on_failed = retry or Backoff(), on_failed
        self._tenures: dict[int, _Tenure] = {}
        self._failures: dict[int, int] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    @property
    def ready(self) -> list[int]:
        """The partitions whose ``on_own`` has returned, and that are not being given back."""
        return sorted(n for n, t in self._tenures.items() if t.ready and not t.ending.is_set())

    def begin(self, partition: int, fence: Fence) -> None:
        """The node owns *partition* from now on."""
        assert partition not in self._tenures, "the ring begins with a partition when the last time has ended"
        tenure = _Tenure(PartitionContext(self._app, self._node, partition, fence))
        self._tenures[partition] = tenure
        tenure.task = asyncio.create_task(self._run(partition, tenure), name=f"{self._app} partition")

    def end(self, partition: int, reason: str, hard: bool) -> None:
        """*partition* is to be given back; *hard*: at once, so ``on_release`` is not run, or is cancelled."""
        tenure = self._tenures[partition]
        log.debug("app %s: partition %d ends: %s", self._app, partition, reason)
        tenure.ending.set()
        if hard:
            tenure.hard.set()

    async def close(self) -> None:
        """End what still runs at once, and see its end."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = [tenure.task for tenure in self._tenures.values()]
        for tenure in self._tenures.values():
            tenure.ending.set()
            tenure.hard.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, partition: int, tenure: _Tenure) -> None:
        if await self._call("on_own", self._on_own, tenure, self._own_seconds, tenure.ending):
            tenure.ready = True
            self._failures.pop(partition, None)
        elif not tenure.ending.is_set():
            self._step_aside(partition)
        await tenure.ending.wait()
        if tenure.begun and not tenure.hard.is_set():
            await self._call("on_release", self._on_release, tenure, self._release_seconds, tenure.hard)
        del self._tenures[partition]
        self._ring.ended(partition)

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
            if not turn.done():
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
            if not running.done():
                problem = f"does not end, {CANCEL_SECONDS:g} s after it was cancelled"
                self._report(name, tenure, problem)

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
