"""A stream of answers, on the side of the caller: a window of items, and the certainty that it ends.

Every wait for an item ends: with the item, the end, an error of the handler's, or OutcomeUnknown, as soon as
the connection breaks, an item is missing, another node leads, or nothing was heard of the handler for ten
seconds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from phalanx.errors import BusTimeout, BusUnavailable, CallError, CallTimeout, OutcomeUnknown
from phalanx.messaging import call_wire as wire
from phalanx.messaging.leading import MOVED_SECONDS, Followed
from phalanx.names import Names
from phalanx.ports import Bus, Connection, Message, Subscription

KEEP_SECONDS = 2.0
"""How often the handler is told that its caller is there."""

SILENT_SECONDS = 10.0
"""A handler of which nothing was heard for this long is gone: it sends something every 2 s."""


class IncomingStream:
    """One stream. Open it with :meth:`ask` (as often as it is not begun) and :meth:`begin`; end it with
    :meth:`close`. ``epoch``: the reign that it belongs to, as :class:`InFlight` has it."""

    def __init__(self, bus: Bus, names: Names, app: str, method: str, call_id: str, window: int) -> None:
        self._bus, self._names = bus, names
        self._followed: Followed | None = None
        self._app, self._method, self._call_id, self._window = app, method, call_id, window
        self.epoch: int | None = None
        self._node = ""
        self._first: asyncio.Future[Message] | None = None
        self._subscription: Subscription | None = None
        self._items: deque[Message] = deque()
        self._received = self._taken = 0
        self._granted = window
        self._more = asyncio.Event()
        self._has_ended = False
        self._error: CallError | None = None
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timers: list[asyncio.TimerHandle] = []
        self._stop_listening: Callable[[], None] | None = None

    # --- opening

    async def ask(self, subject: str, data: bytes, *, headers: Mapping[str, str], timeout: float) -> Message:
        """One try to open it: the first message of the handler's. Raises as :meth:`Bus.request` does."""
        await self._unsubscribe()
        subject = self._names.many_subject(subject)
        inbox = self._bus.new_inbox()
        self._first = first = self._loop.create_future()
        self._items.clear()
        self._received = 0
        self._has_ended, self._error = False, None
        self.epoch = wire.CallHeader(headers[wire.CALL]).epoch

        def on_message(message: Message) -> None:
            if first is self._first:
                self._on_message(message, first)

        self._subscription = await self._bus.subscribe(inbox, on_message, direct=True)
        if self._stop_listening is None:
            self._stop_listening = self._bus.on_connection(self._on_connection)
        self._bus.send(subject, data, headers, reply=inbox)
        try:
            async with asyncio.timeout(timeout):
                message = await first
        except TimeoutError:
            raise BusTimeout(f"stream {subject}", f"not begun within {timeout:g} s") from None
        if not message.data and message.headers.get("Status") == "503":
            raise BusUnavailable(f"stream {subject}", "nobody answers there just now")
        return message

    def begin(self, followed: Followed, until_seconds: float) -> None:
        """It has begun, and lasts for *until_seconds* at most, which may be infinite."""
        if self._has_ended:
            return
        self._followed = followed
        followed.in_flight.add(self)
        if self.epoch is not None and self.epoch < followed.epoch:
            self.end_soon()
        self._timers.append(self._loop.call_later(KEEP_SECONDS, self._keep))
        if until_seconds < float("inf"):
            self._timers.append(self._loop.call_later(max(0.0, until_seconds), self._too_late))

    # --- taking

    async def next(self) -> Message | None:
        """The next item; None: that was the last. Raises CallError."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return None
            self._more.clear()
            await self._more.wait()
        item = self._items.popleft()
        self._taken += 1
        if self._granted - self._taken <= self._window // 2 and not self._has_ended:
            self._granted = self._taken + self._window
            self._grant()
        return item

    async def close(self) -> None:
        """Take no more of it: the handler ends, if it has not yet."""
        if not self._has_ended:
            self._cancel()
        self._end()
        await self._unsubscribe()

    # --- what happens to it

    def end_soon(self) -> None:
        """A later epoch has begun: the handler has a moment to say how it ended."""
        self._timers.append(self._loop.call_later(MOVED_SECONDS, self._lost, f"epoch {self.epoch} is over"))

    def end_now(self) -> None:
        """The client is closed."""
        self._lost("the client was closed")

    def _on_connection(self, event: Connection) -> None:
        if event in (Connection.DISCONNECTED, Connection.CLOSED):
            if self._first is not None and not self._first.done():
                problem = "the connection broke; whether it was begun is unknown"
                self._first.set_exception(BusTimeout("stream", problem))
            else:
                self._lost("the connection broke")

    def _on_message(self, message: Message, first: asyncio.Future[Message]) -> None:
        self._heard_at = self._loop.time()
        said = message.headers.get(wire.STREAM)
        if said is not None and not self._has_ended:
            self._take(message, said)
        if not first.done():
            first.set_result(message)

    def _take(self, message: Message, said: str) -> None:
        number, _, what = said.partition(";")
        self._node, epoch = wire.answered_by(message.headers)
        newest = self._followed.epoch if self._followed is not None and self.epoch is not None else 0
        if 0 < epoch < newest:
            self._lost(f"what comes is of epoch {epoch}, which is over")
        elif number != str(self._received + (not what)):
            self._lost(f"item {self._received + 1} was lost on its way")
        elif what == "end":
            problem = wire.problem_of(message.data, message.headers)
            if problem is not None:
                self._error = wire.error_of(problem, self._app, self._method, self._node)
            self._end()
        elif not what:
            self._received += 1
            self._items.append(message)
            self._more.set()

    def _too_late(self) -> None:
        self._fail(CallTimeout, "deadline", "the stream did not end before the deadline")

    def _lost(self, why: str) -> None:
        self._fail(OutcomeUnknown, "interrupted", f"the stream broke off: {why}")

    def _fail(self, kind: type[CallError], code: str, problem: str) -> None:
        if not self._has_ended:
            self._error = kind(
                code, problem, app=self._app, method=self._method, node=self._node, started=True
            )
            self._cancel()
            self._end()

    def _end(self) -> None:
        self._has_ended = True
        self._more.set()
        if self._followed is not None:
            self._followed.in_flight.discard(self)
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    # --- telling the handler

    def _keep(self) -> None:
        if self._loop.time() - self._heard_at > SILENT_SECONDS:
            self._lost(f"nothing was heard of it for {SILENT_SECONDS:g} s")
            return
        self._grant()
        self._timers[0] = self._loop.call_later(KEEP_SECONDS, self._keep)

    def _grant(self) -> None:
        subject = self._names.call_flow_subject(self._app, self._node)
        self._send(subject, f"{self._call_id};{self._granted}")

    def _cancel(self) -> None:
        self._send(self._names.call_cancel_subject(self._app), self._call_id)

    def _send(self, subject: str, text: str) -> None:
        if self._bus.is_connected:  # else the handler finds itself that nobody is there
            self._bus.send(subject, text.encode())

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
