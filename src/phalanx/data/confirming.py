"""Confirmations: a standby says that it has an app's log on disk up to some sequence.

The active node asks on one subject, every follower hears it, and the first answer wins. A follower answers
only once it has applied the log so far, in the history that the asking epoch writes, and has synced it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from phalanx import system
from phalanx.errors import BusError, BusTimeout, BusUnavailable, PhalanxError
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription
from phalanx.types import Position

log = logging.getLogger("phalanx.following")

MAX_WAITING = 1024
WAIT_SECONDS = 30.0
"""How long a follower that is behind remembers a request."""

ASK_SECONDS = 1.0
"""After this long without an answer it is asked again: whoever would have answered may be gone."""

RETRY_SECONDS = (0.02, 0.25)


class _Request(msgspec.Struct):
    sequence: int
    epoch: int = 0


class Confirmation(msgspec.Struct, frozen=True):
    """*node* has everything up to *sequence* on disk."""

    node: str
    sequence: int


_decode_request = msgspec.json.Decoder(_Request).decode
_decode_answer = msgspec.json.Decoder(Confirmation).decode
_encode = msgspec.json.Encoder().encode


async def confirmed(
    bus: Bus, names: Names, app: str, sequence: int, timeout: float, *, epoch: int = 0
) -> Confirmation:
    """Ask until a standby has *app*'s log up to *sequence* on disk. Raises TimeoutError.

    *epoch*: the one that wrote there; a standby that has followed another one's log does not answer.
    """
    request, subject = _encode(_Request(sequence, epoch)), names.confirm_subject(app)
    deadline = system.now() + timeout
    delay, longest = RETRY_SECONDS
    while (left := deadline - system.now()) > 0:
        try:
            answer = await bus.request(subject, request, timeout=min(left, ASK_SECONDS))
            found = _decode_answer(answer.data)
            if found.sequence >= sequence:
                return found
        except BusTimeout:
            continue
        except (BusUnavailable, ValueError) as error:
            log.debug("no confirmation of %d yet: %s", sequence, error)
        await asyncio.sleep(min(delay, max(0.0, deadline - system.now())))
        delay = min(longest, 2 * delay)
    raise TimeoutError(f"no standby of app {app!r} has confirmed {sequence} within {timeout:g} s")


class _Waiting(msgspec.Struct):
    sequence: int
    epoch: int
    reply: str
    until: float


class Confirmer:
    """Answers for one follower. *sync* puts what is applied on disk, and returns up to where.

    *state*: the sequence that is applied, and the epoch that wrote it; None while that is not certain.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        node: str,
        *,
        sync: Callable[[], Awaitable[Position]],
        state: Callable[[], tuple[int, int] | None],
    ) -> None:
        self._bus, self._subject, self._node = bus, names.confirm_subject(app), node
        self._sync, self._state = sync, state
        self._waiting: list[_Waiting] = []
        self._look = asyncio.Event()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._run(), name="confirmer")
        self._subscription = await self._bus.subscribe(self._subject, self._on_request)

    async def stop(self) -> None:
        """Answer nothing any more; harmless when done twice."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def progress(self) -> None:
        """More is applied."""
        if self._waiting:
            self._look.set()

    def _on_request(self, message: Message) -> None:
        try:
            request = _decode_request(message.data)
        except ValueError as error:
            log.warning("a request on %s makes no sense: %s", self._subject, error)
            return
        if len(self._waiting) >= MAX_WAITING:
            del self._waiting[: MAX_WAITING // 2]  # the oldest have been asked again, or given up
        until = system.now() + WAIT_SECONDS
        self._waiting.append(_Waiting(request.sequence, request.epoch, message.reply, until))
        self._look.set()

    async def _run(self) -> None:
        while True:
            await self._look.wait()
            self._look.clear()
            now = system.now()
            self._waiting = [each for each in self._waiting if each.until > now]
            if not self._due():
                continue
            try:
                position = await self._sync()
            except PhalanxError as error:
                log.warning("nothing can be confirmed: %s", error)
                continue
            due = [each for each in self._due() if each.sequence <= position.sequence]
            self._waiting = [each for each in self._waiting if each not in due]
            answer = _encode(Confirmation(self._node, position.sequence))
            for each in due:
                await self._answer(each.reply, answer)

    def _due(self) -> list[_Waiting]:
        state = self._state()
        if state is None:
            return []
        sequence, epoch = state
        return [w for w in self._waiting if w.sequence <= sequence and w.epoch in (0, epoch)]

    async def _answer(self, reply: str, answer: bytes) -> None:
        try:
            await self._bus.publish(reply, answer)
        except BusError as error:
            log.debug("a confirmation could not be sent: %s", error)  # it is asked again
