"""Calls from code without an event loop: what :class:`PlatformClient` is inside of a plain ``with``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from datetime import datetime
from typing import Any as Value
from typing import Generic, Self, TypeVar

from phalanx.errors import CallError
from phalanx.messaging.api import Api, check_arguments
from phalanx.messaging.content import JSON
from phalanx.messaging.event import Event
from phalanx.messaging.event_reading import EventReader
from phalanx.messaging.events import Events
from phalanx.messaging.middleware import CallerMiddleware
from phalanx.messaging.routes import Default, Route
from phalanx.messaging.stubs import CallOptions, make_stub

T = TypeVar("T")

_WHATEVER: Value = Value


_CLOSED = "the synchronous client was closed"

_END_SECONDS = 5.0
"""How long what is cancelled at the close may take to end."""


class LoopThread:
    """An event loop in a thread of its own. End it with :meth:`close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Value, Value, T]) -> T:
        """Run *work* there and wait for its end. If waiting is interrupted, *work* is cancelled.

        Raises RuntimeError when called from that very thread, after the close, and if it is closed meanwhile.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a synchronous client waits for its own thread; use it as async with there")
        with self._lock:  # whatever is begun here is begun before the end: so it is ended by that
            if self._is_closed:
                work.close()
                raise RuntimeError(_CLOSED)
            future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if self._is_closed:
                raise RuntimeError(_CLOSED) from None
            raise
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread; what others have begun there is cancelled. Nothing runs there any more by then."""
        with self._lock:
            self._is_closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_END_SECONDS)


class SyncApi:
    """See :class:`phalanx.Api`. From any thread."""

    def __init__(self, api: Api, thread: LoopThread) -> None:
        self._api, self._thread = api, thread
        self.app = api.app

    def using(self, *middleware: CallerMiddleware) -> SyncApi:
        """See :meth:`phalanx.Api.using`. They are async, and run in the client's own thread."""
        return SyncApi(self._api.using(*middleware), self._thread)

    def stub(
        self,
        interface: type[T],
        *,
        to: Route | Callable[..., Route] | None = None,
        timeout: float | None = None,
        idempotent: bool | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """See :meth:`phalanx.Api.stub`; the methods of *interface* are not async: each waits."""
        defaults = CallOptions(to, timeout, idempotent, content_type, headers)
        return make_stub(
            self.app, self.call, self.stream, check_arguments, interface, defaults, is_async=False
        )

    def stream(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        to: Route = Default,
        timeout: float = 5.0,
        window: int = 64,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> Generator[T]:
        """See :meth:`phalanx.Api.stream`; a plain iterator, which closes the stream when it is closed."""
        items = self._api.stream(
            method,
            request,
            returns=returns,
            to=to,
            timeout=timeout,
            window=window,
            content_type=content_type,
            headers=headers,
        )
        return self._items(items)

    def broadcast(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        timeout: float = 5.0,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, T | CallError]:
        """See :meth:`phalanx.Api.broadcast`."""
        work = self._api.broadcast(
            method, request, returns=returns, timeout=timeout, content_type=content_type, headers=headers
        )
        return self._thread.run(work)

    def _items(self, items: AsyncGenerator[T]) -> Generator[T]:
        async def next_item() -> T:
            return await anext(items)

        async def close() -> None:
            await items.aclose()

        try:
            while True:
                try:
                    item = self._thread.run(next_item())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._thread.run(close())

    def call(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        to: Route = Default,
        timeout: float = 5.0,
        idempotent: bool | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """See :meth:`phalanx.Api.call`."""
        work = self._api.call(
            method,
            request,
            returns=returns,
            to=to,
            timeout=timeout,
            idempotent=idempotent,
            content_type=content_type,
            headers=headers,
        )
        return self._thread.run(work)


class SyncEvents:
    """See :class:`phalanx.messaging.events.Events`. From any thread."""

    def __init__(self, events: Events, thread: LoopThread) -> None:
        self._events, self._thread = events, thread

    def publish(
        self,
        subject: str,
        data: object = None,
        *,
        key: str = "",
        message_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str = JSON,
        timeout: float = 5.0,
    ) -> int:
        """Publish one event; its sequence, once NATS has stored it."""
        work = self._events.publish(
            subject,
            data,
            key=key,
            message_id=message_id,
            headers=headers,
            content_type=content_type,
            timeout=timeout,
        )
        return self._thread.run(work)

    def subscribe(
        self,
        pattern: str = ">",
        type: type[T] = _WHATEVER,
        *,
        since: datetime | float | None = None,
        after: int | None = None,
    ) -> SyncEventReader[T]:
        """Events as they come: ``with client.events("wiki").subscribe("user.*") as events: ...``."""
        return SyncEventReader(self._events.subscribe(pattern, type, since=since, after=after), self._thread)


class SyncEventReader(Generic[T]):
    """``for event in reader`` waits for ever; ``next_within(seconds)`` does not."""

    def __init__(self, reader: EventReader[T], thread: LoopThread) -> None:
        self._reader, self._thread = reader, thread

    def __enter__(self) -> Self:
        self._thread.run(self._reader.open())
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self._reader.aclose())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event[T]:
        event = self._thread.run(self._next(None))
        if event is None:
            raise StopIteration
        return event

    def next_within(self, seconds: float) -> Event[T] | None:
        """The next event; None if none comes within *seconds*."""
        return self._thread.run(self._next(seconds))

    async def _next(self, seconds: float | None) -> Event[T] | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(self._reader, None)
        except TimeoutError:
            return None
