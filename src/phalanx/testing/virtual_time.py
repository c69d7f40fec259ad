"""An event loop whose time jumps to the next timer when nothing else is to be done.

For coroutines that only wait for timers and for each other: hooks with their deadlines, retries,
back-offs. An hour passes in a millisecond, and always in the same order::

    def test_my_hook_gives_up_after_an_hour():
        with virtual_time() as run:
            assert run(my_hook(ctx)) == "gave up"
            assert run.now() == pytest.approx(3600, abs=1)

Real I/O does not advance this time and is served only as far as it is ready at once; threads may be
waited for (time stands still meanwhile).
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from phalanx import system

T = TypeVar("T")

_THREAD_GRACE_SECONDS = 0.02


class _Selector(selectors.DefaultSelector):
    """Waits not at all, but says how long it would have waited."""

    def __init__(self, threads: bool) -> None:
        super().__init__()
        self._threads = threads
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            # No timer is set: only a thread can bring news. If none does this would wait for ever.
            ready = super().select(5.0)
            if not ready:
                raise RuntimeError("virtual time: everything waits, and no timer is set")
            return ready
        # Threads finish in real time: give one that is about to a chance before time jumps.
        ready = super().select(_THREAD_GRACE_SECONDS if self._threads and _threads_run() else 0)
        if not ready:
            self.skipped += timeout
        return ready


def _threads_run() -> bool:
    import threading

    return threading.active_count() > 1


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """``time()`` begins at 0 and jumps."""

    def __init__(self, threads: bool = True) -> None:
        self._virtual = _Selector(threads)
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._virtual.skipped


class Run:
    """Runs coroutines in virtual time, one after the other."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* to its end and return its result."""
        return self._loop.run_until_complete(work)

    def now(self) -> float:
        """Seconds of virtual time since the beginning."""
        return self._loop.time()


@contextmanager
def virtual_time(*, threads: bool = True) -> Generator[Run]:
    """A loop in virtual time; ``phalanx.system.now()`` follows it meanwhile.

    *threads*: whether a thread may bring news. If the process has any, time then waits for them in each
    step, up to 20 ms of real time: thousands of steps take minutes.
    """
    loop = VirtualTimeLoop(threads)
    real = system.now
    system.now = loop.time
    try:
        yield Run(loop)
    finally:
        system.now = real
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
