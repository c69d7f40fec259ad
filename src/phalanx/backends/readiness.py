"""How a program that starts is waited for: asked often at first, then less often, and within its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from phalanx import system
from phalanx.config import Check
from phalanx.probes import CheckFailed, Probe

LONGEST_PAUSE_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.01
PAUSE_SHARE = 0.1
"""Of the time the program has taken so far: what a look that comes too late may add to it."""


async def poll(check: Check, on_failure: Callable[[str], None]) -> None:
    """Return once *check* passes; the caller sets a deadline. *on_failure* hears what each run saw."""
    probe, first = Probe(check), system.now()
    while True:
        began = system.now()
        try:
            await probe.run()
            return
        except CheckFailed as error:
            on_failure(error.detail)
        pause = max(FIRST_PAUSE_SECONDS, PAUSE_SHARE * (began - first))
        pause = min(pause, check.interval, LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(max(0.0, began + pause - system.now()))


class Outcome(NamedTuple):
    """Whether it *passed* in time; *error*: what the waiting raised, which then is no pass."""

    passed: bool
    error: BaseException | None = None


async def wait(
    app: str, passing: Coroutine[Any, Any, object], failing: Coroutine[Any, Any, object], seconds: float
) -> Outcome:
    """Until *passing* or *failing* has ended, *seconds* at most; nothing of either runs on.

    Look afterwards whether the program lives: a check may pass because of somebody else on its port, the
    very reason why it ended.
    """
    ready = asyncio.create_task(passing, name=f"{app} backend, ready?")
    failed = asyncio.create_task(failing, name=f"{app} backend, failed?")
    try:
        await asyncio.wait({ready, failed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        is_over = ready.done()
    finally:
        for task in (ready, failed):
            task.cancel()
        await asyncio.gather(ready, failed, return_exceptions=True)
    error = None if not is_over or ready.cancelled() else ready.exception()
    return Outcome(is_over and error is None, error)
