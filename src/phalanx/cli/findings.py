"""What ``phalanx doctor`` finds: one line for each check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum

import msgspec

from phalanx.errors import PhalanxError

CHECK_SECONDS = 20.0
"""The longest that one check may take."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, but not as well as it could, or not after the next fault."""
    FAIL = "fail"
    """A node cannot start or work like this."""


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. ``remedy`` is empty when all is well."""

    check: str
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, remedy: str) -> Finding:
    """It could be better."""
    return Finding(check, Level.WARN, text, remedy)


def fail(check: str, text: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(check, Level.FAIL, text, remedy)


Check = Callable[[], Awaitable[list[Finding]]]


async def run_checks(checks: list[tuple[str, Check]]) -> AsyncIterator[Finding]:
    """The findings of all *checks*, one after the other. A check that raises or takes too long has failed."""
    for name, check in checks:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                found = await check()
        except TimeoutError:
            found = [fail(name, f"no result within {CHECK_SECONDS:g} s", "see the logs of the NATS servers")]
        except (PhalanxError, OSError) as error:
            found = [fail(name, str(error), "see above, and the logs of the NATS servers")]
        for finding in found:
            yield finding
