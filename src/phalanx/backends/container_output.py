"""What a container writes, into the node's log: read as its engine stores it, never faster than we may.

The engine keeps it in files of bounded size, so a container that floods loses its oldest lines there, and
never waits for us. Reading takes at most ``child.LOOP_SHARE`` of the event loop's time, as for a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable

from phalanx import child, system
from phalanx.aio import wait_at_most
from phalanx.backends.engine import Engine, EngineError
from phalanx.containers import PING_SECONDS

RECONNECT_SECONDS = 0.5
_LONGEST_REST_SECONDS = 0.25
_LONGEST_LINE = 1 << 16
_TIME = len("2026-01-02T03:04:05.123456789Z")
"""What the engine puts before each line, with ``timestamps``: always nine digits, always UTC."""

log = logging.getLogger("phalanx.backend")


class Output:
    """Hands on the lines of one container, each once, also over a restart of the engine."""

    def __init__(self, engine: Engine, container: str, app: str, keep: Callable[[str], None]) -> None:
        self._engine, self._container, self._app, self._keep = engine, container, app, keep
        self._lines = logging.getLogger(f"phalanx.app.{app}")
        self.last_line = ""
        self._last_time = ""
        self._turn_began = 0.0
        self._in_turn = 0
        self._done = asyncio.Event()

    async def follow(self, since: float, ended: asyncio.Event) -> None:
        """Until it has ended, what it wrote from Unix time *since* on."""
        start = f"{since:.9f}"
        try:
            while True:
                at_end = ended.is_set()
                try:
                    await self._read(_unix(self._last_time) if self._last_time else start)
                except EngineError as error:
                    if error.status in (400, 404, 409, 500, 501):  # gone, or a log driver that can't be read
                        if not ended.is_set():
                            log.warning("app %s: its output can't be followed: %s", self._app, error)
                        return
                if at_end:
                    return
                await wait_at_most(ended, RECONNECT_SECONDS)
        finally:
            self._done.set()

    async def finish(self, seconds: float) -> None:
        """Give what it wrote last that long to arrive; of more than that, only the last lines are shown."""
        if await wait_at_most(self._done, seconds):
            return
        with contextlib.suppress(EngineError, TimeoutError):
            # One that hangs is not waited for; one that is slow is.
            async with asyncio.timeout(PING_SECONDS):
                await self._engine.version()
            lines = await self._engine.tail(self._container, child.LAST_LINES, timestamps=True)
            shown = self._last_time
            if lines and lines[0][:_TIME] > shown:
                self._lines.info("[lines left out]")
            for line in lines:
                self._take(line, shown)

    async def _read(self, since: str) -> None:
        shown, rest = self._last_time, ""
        self._turn_began, self._in_turn = system.now(), 0
        async for piece in self._engine.output(self._container, timestamps=True, since=since):
            if rest and piece[:_TIME] == rest[:_TIME]:  # a long line comes in parts, each with its time
                piece = piece[_TIME + 1 :]
            *lines, rest = (rest + piece).split("\n")
            if len(rest) > _LONGEST_LINE:
                lines.append(rest)
                rest = ""
            for line in lines:
                self._take(line, shown)
                await self._pace()
        if rest:
            self._take(rest, shown)

    def _take(self, line: str, shown: str) -> None:
        """Hand on a line, unless it was *shown* in an earlier reading: the times compare as text."""
        time, _, text = line.partition(" ")
        if time <= shown:
            return
        self._last_time = time
        text = text.rstrip()
        if not text:
            return
        self.last_line = text
        for at in range(0, len(text), child.MAX_LINE_BYTES):
            self._lines.info("%s", part := text[at : at + child.MAX_LINE_BYTES])
            self._keep(part)

    async def _pace(self) -> None:
        self._in_turn += 1
        if self._in_turn < child.LINES_A_TURN:
            return
        took = system.now() - self._turn_began
        await asyncio.sleep(min(took * (1 / child.LOOP_SHARE - 1), _LONGEST_REST_SECONDS))
        self._turn_began, self._in_turn = system.now(), 0


def _unix(text: str) -> str:
    """A time as Docker writes it (``2026-01-02T03:04:05.123456789Z``), as the API takes it: exactly."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    moment = datetime.datetime.fromisoformat(seconds).replace(tzinfo=datetime.UTC)
    return f"{int(moment.timestamp())}.{fraction or 0:0<9}"
