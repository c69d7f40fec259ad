"""Events as they come, or from some time on, for one reader that nobody keeps account of.

It reads the stream by direct get (ADR-31) and hears of new events by what the stream republishes, which only
wakes it. So there is no consumer on the server, whoever may read the stream may subscribe, and what is on its
way is bounded by the page that the reader has asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.errors import BusError, BusTimeout, BusUnavailable, ConfigError, EventError, EventsLost
from phalanx.messaging.content import ContentError, shape_of
from phalanx.messaging.event import ONLY_FOR, Event, check_subject, decoded, key_of
from phalanx.names import Names
from phalanx.ports import STREAM_NOT_FOUND, Bus, Message, Record, Subscription

log = logging.getLogger("phalanx.events")

T = TypeVar("T")

PAGE = 256
PAGE_BYTES = 4 << 20
POLL_SECONDS = 2.0
"""Between looks that nothing asked for: the message that would have may be lost."""

AFTER_WAKE_SECONDS = (0.0, 0.002, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Another server of the stream may answer than the one that stored it first."""

RETRY_SECONDS = (0.05, 1.0)
CHECK_SECONDS = 1.0


class EventReader(Generic[T]):
    """``async for event in ...``; end it with :meth:`aclose`, or use it as ``async with``.

    An event that is not of the declared type raises EventError, dropped ones EventsLost; one may go on after
    either. While NATS is away it waits.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str | None,
        pattern: str,
        kind: Any,
        since: datetime | float | None,
        after: int | None,
    ) -> None:
        self._bus, self._names = bus, names
        self._stream = names.events_stream(app)
        self._subjects = names.event_subject(app, check_subject(pattern, pattern=True))
        self._watched = names.event_watch(app, pattern)
        self._what = f"subscription of {pattern}"
        try:
            self._shape = shape_of(kind)
        except TypeError as error:
            raise ConfigError("type", kind, str(error), "use a type that can be sent") from None
        self._since, self._position = _start(since, after)
        self._page: deque[Record] = deque()
        self._woken = asyncio.Event()
        self._subscription: Subscription | None = None
        self._checked_at = 0.0
        self._opened = self._closed = False

    async def open(self) -> Self:
        """Begin: what is published from now on is read. Not needed before ``async for``. Raises EventError,
        BusError."""
        if not self._opened:
            self._opened = True
            self._subscription = await self._bus.subscribe(self._watched, self._on_message)
            if self._position is None and self._since is None:
                self._position = (await self._state())[1]
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Read no more; harmless when done twice."""
        self._closed = True
        self._woken.set()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event[T]:
        await self.open()
        while not self._closed:
            while self._page:
                record = self._page.popleft()
                if ONLY_FOR not in record.headers:
                    return self._event(record)
            await self._fill()
        raise StopAsyncIteration

    def _on_message(self, message: Message) -> None:
        self._woken.set()

    async def _fill(self) -> None:
        """Wait for events, and read them."""
        delay, longest = RETRY_SECONDS
        while not (self._page or self._closed):
            self._woken.clear()
            try:
                if await self._read():
                    return
            except (BusUnavailable, BusTimeout) as error:
                log.debug("%s: %s", self._what, error)
                await asyncio.sleep(delay)
                delay = min(longest, 2 * delay)
                continue
            if await wait_at_most(self._woken, POLL_SECONDS):
                for seconds in AFTER_WAKE_SECONDS:
                    await asyncio.sleep(seconds)
                    if await self._read():
                        return

    async def _read(self) -> bool:
        since = self._since if self._position is None else None
        page = await self._bus.read_log(
            self._stream,
            self._subjects,
            start=(self._position or 0) + 1,
            start_time=since,
            limit=PAGE,
            max_bytes=PAGE_BYTES,
        )
        if not page:
            return False
        before, self._position = self._position, page[-1].revision
        self._page.extend(page)
        if before is not None and page[0].revision > before + 1:
            await self._check_dropped(before, page[0].revision, full=len(page) == PAGE)
        return True

    async def _check_dropped(self, position: int, found: int, *, full: bool) -> None:
        """Whether what lies between was dropped, not only of other subjects."""
        if not full and system.now() - self._checked_at < CHECK_SECONDS:
            return
        first, _ = await self._state()
        self._checked_at = system.now()
        if first > position + 1:
            raise EventsLost(self._what, position + 1, min(first, found) - 1)

    async def _state(self) -> tuple[int, int]:
        """The first and the last sequence of the stream."""
        while True:
            try:
                info = await self._bus.api(f"STREAM.INFO.{self._stream}", {}, timeout=2.0)
            except (BusUnavailable, BusTimeout) as error:
                log.debug("%s: %s", self._what, error)
                await asyncio.sleep(RETRY_SECONDS[0])
                continue
            except BusError as error:
                if error.code == STREAM_NOT_FOUND:
                    problem = f"there is no stream {self._stream}"
                    raise EventError(problem, "does the app declare events? see docs/events.md") from None
                raise
            return int(info["state"]["first_seq"]), int(info["state"]["last_seq"])

    def _event(self, record: Record) -> Event[T]:
        subject = self._names.event_of(record.subject)
        try:
            data = decoded(record.data, record.headers, self._shape)
        except ContentError as error:
            problem = f"event {subject} (sequence {record.revision}) cannot be read as declared: {error}"
            raise EventError(problem) from None
        return Event(
            subject,
            data,
            sequence=record.revision,
            time=record.time,
            key=key_of(record.headers),
            headers=record.headers,
        )


def _start(since: datetime | float | None, after: int | None) -> tuple[float | None, int | None]:
    if since is not None and after is not None:
        raise ConfigError("since", since, "after is given too", "keep one of them")
    if after is not None and (isinstance(after, bool) or after < 0):
        raise ConfigError("after", after, "no sequence", "give that of an event, or 0")
    if isinstance(since, datetime):
        since = since.timestamp()
    if since is not None and (isinstance(since, bool) or not 0 <= since < 1e11):
        raise ConfigError("since", since, "no time", "give a datetime, or Unix seconds")
    return since, after


__all__ = ["EventReader"]
