"""Waiting for a condition, with a deadline: what tests do in place of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

STEP_SECONDS = 0.005
"""Between looks. Much of what is waited for lies in other processes, which tell nobody."""


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until *condition* (sync or async) holds; what it returned.

    Raises TimeoutError after *seconds*, which are generous: tests share slow cores.
    """
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(STEP_SECONDS)
