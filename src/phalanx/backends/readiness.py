"""How a program that starts is asked whether it is ready: often at first, then less and less often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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
