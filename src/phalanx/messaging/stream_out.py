"""A stream of answers, on the side of the handler: no item is made before the caller has room for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from phalanx.errors import CallError
from phalanx.messaging import call_wire as wire
from phalanx.messaging.content import encode

BEAT_SECONDS = 2.0
"""A caller hears something at least this often."""

LEASE_SECONDS = 15.0
"""A caller of which nothing was heard for this long is gone: it says every 2 s that it is there."""


class OutgoingStream:
    """One stream. *send* sends data with headers; *check* raises what ends it before the next item;
    *on_silence* is called when the caller is gone. End it with :meth:`close`."""

    def __init__(
        self,
        window: int,
        content_type: str,
        *,
        most_bytes: int,
        send: Callable[[bytes, dict[str, str]], None],
        check: Callable[[], None],
        on_silence: Callable[[], None],
    ) -> None:
        self._content_type, self._most_bytes = content_type, most_bytes
        self._send, self._check, self._on_silence = send, check, on_silence
        self._allowed, self._sent = min(window, wire.MAX_WINDOW), 0
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._is_quiet = False
        """Whether nothing was sent since the last beat."""
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def grant(self, total: int) -> None:
        """The caller is there, and takes *total* items in all."""
        self._heard_at = self._loop.time()
        self._allowed = max(self._allowed, min(total, self._sent + wire.MAX_WINDOW))
        self._more.set()

    def begin(self) -> None:
        """Tell the caller that the handler has begun."""
        self._frame(b"", "alive")

    async def pump(self, items: AsyncGenerator[Any]) -> None:
        """Send what *items* yields, to its end, which is not sent here. Closes it in any case.

        Raises what it raises, ContentError, CallError for an item that is too large.
        """
        async with contextlib.aclosing(items):
            while True:
                while self._sent >= self._allowed:
                    self._more.clear()
                    await self._more.wait()
                self._check()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                self._check()
                data = encode(item, self._content_type)
                if len(data) > self._most_bytes:
                    problem = f"item {self._sent + 1} has {len(data)} bytes, which fit into no message"
                    raise CallError("too-large", problem)
                self._sent += 1
                self._frame(data)

    def end_header(self) -> str:
        """That of the last message, with or without an error."""
        return f"{self._sent};end"

    def close(self) -> None:
        """It has ended: nothing is sent any more."""
        self._timer.cancel()

    def _frame(self, data: bytes, what: str = "") -> None:
        headers = {wire.STREAM: f"{self._sent};{what}" if what else str(self._sent)}
        if data and self._content_type != wire.JSON:
            headers[wire.CONTENT_TYPE] = self._content_type
        self._is_quiet = False
        self._send(data, headers)

    def _beat(self) -> None:
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)
        if self._loop.time() - self._heard_at > LEASE_SECONDS:
            self._on_silence()
        elif self._is_quiet:
            self._frame(b"", "alive")
        self._is_quiet = True
