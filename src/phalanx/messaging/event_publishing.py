"""Publishing of events: stored once however often it is tried, and refused under an epoch that is over."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Callable, Mapping

from phalanx import system
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    EventError,
    WrongRevision,
)
from phalanx.messaging.content import JSON
from phalanx.messaging.event import check_subject, content_of, headers_of
from phalanx.messaging.event_fence import EventFence
from phalanx.names import Names
from phalanx.observe import tracing
from phalanx.ports import STREAM_NOT_FOUND, Bus, Fence

ANSWER_SECONDS = 2.0
"""How long one try waits: then the same event is sent again, under the same id."""

RETRY_SECONDS = (0.02, 0.5)
MAX_TIMEOUT_SECONDS = 60.0
"""Half of the window in which the server knows an id again: no try may come after it."""

NO_LEADER = (10008, 10009)
"""JSClusterNotAvailErr, JSClusterNotLeaderErr: an election is under way."""

SAME_ID_UNDER_WAY = 10158
"""JSStreamDuplicateMessageConflict: an earlier try of this very event is being stored."""


class Publisher:
    """Publishes events of *app* (None: of the platform) over one connection.

    *publishes* counts, for metrics. What it is under: see :class:`FencedPublisher`.
    """

    def __init__(self, bus: Callable[[], Bus], names: Names, app: str | None) -> None:
        self._bus, self._names, self._app = bus, names, app
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count(1)
        self.published = 0

    async def publish(
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
        """Publish one event; its sequence, once NATS has stored it.

        *subject*: tokens with dots between. *key*: events of one key stay in order, up to 256 characters.
        *message_id*: two events with one id within two minutes are stored once, and both calls return the
        sequence of the first; made up if left out. *timeout*: seconds, up to 60: it is tried again through
        failovers of NATS. *headers* reach the handler.

        Raises ConfigError and EventError for what cannot be published, BusUnavailable if it was not stored,
        BusTimeout if that is not known: then repeat it with the same id.
        """
        check_subject(subject)
        if isinstance(timeout, bool) or not 0.01 <= timeout <= MAX_TIMEOUT_SECONDS:
            raise ConfigError("timeout", timeout, "out of range", f"0.01 to {MAX_TIMEOUT_SECONDS:g} seconds")
        if message_id is None:
            message_id = f"{self._prefix}-{next(self._numbers)}"
        bus = self._bus()
        made = headers_of(message_id, key, content_type, headers)
        body = content_of(data, content_type, bus.max_payload)
        where = self._names.event_subject(self._app, subject)
        if tracing.tracer() is None:
            sequence = await self._store(bus, where, body, made, timeout)
        else:
            with tracing.producer_span(subject, made, app=self._app or ""):
                sequence = await self._store(bus, where, body, made, timeout)
        self.published += 1
        return sequence

    async def _store(
        self, bus: Bus, subject: str, body: bytes, headers: dict[str, str], timeout: float
    ) -> int:
        return await store_once(bus, subject, body, headers, timeout)


class FencedPublisher(Publisher):
    """Publishes under one reign: ``Fenced`` once another leader is active.

    One at a time: the server lets no two writes under one expectation be under way on a replicated stream.
    """

    def __init__(
        self, bus: Bus, names: Names, app: str, fence: EventFence, sealed: Fence, epoch: int
    ) -> None:
        super().__init__(lambda: bus, names, app)
        self._epoch, self._fence, self._sealed = epoch, fence, sealed
        self._turn = asyncio.Lock()

    async def _store(
        self, bus: Bus, subject: str, body: bytes, headers: dict[str, str], timeout: float
    ) -> int:
        deadline = system.now() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._turn.acquire()
        except TimeoutError:
            raise BusUnavailable(f"publish {subject}", f"others took all of {timeout:g} s") from None
        try:
            while True:
                left = max(0.01, deadline - system.now())
                try:
                    return await store_once(bus, subject, body, headers, left, self._sealed)
                except WrongRevision as error:
                    # Refused as another leader has sealed; or since the fence is gone; or by a collision.
                    if system.now() >= deadline:
                        raise BusTimeout(f"publish {subject}", str(error)) from error
                    self._sealed = await self._fence.seal(self._epoch, timeout=left)
                await asyncio.sleep(0.001)
        finally:
            self._turn.release()


async def store_once(
    bus: Bus,
    subject: str,
    body: bytes,
    headers: Mapping[str, str],
    timeout: float,
    fence: Fence | None = None,
) -> int:
    """Store a message that has an id, tried again until *timeout*; its sequence.

    Raises WrongRevision (the fence), BusUnavailable, BusTimeout.
    """
    deadline = system.now() + timeout
    delay, longest = RETRY_SECONDS
    unknown: BusTimeout | None = None
    while True:
        left = deadline - system.now()
        try:
            return await bus.write(
                subject, body, headers=headers, fence=fence, timeout=max(0.01, min(left, ANSWER_SECONDS))
            )
        except BusTimeout as error:
            unknown = problem = error
        except WrongRevision:
            raise
        except BusUnavailable as error:
            problem = error
        except BusError as error:
            if error.code not in (*NO_LEADER, SAME_ID_UNDER_WAY):
                raise
            problem = error
        if system.now() + delay >= deadline:
            # An earlier try that nobody answered may have been stored, whatever the last one says.
            raise unknown or problem
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(longest, 2 * delay)


async def check_there(bus: Bus, stream: str, what: str) -> None:
    """Raises EventError where there is no stream *stream*."""
    try:
        await bus.api(f"STREAM.INFO.{stream}", {}, timeout=ANSWER_SECONDS)
    except BusError as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        raise EventError(f"{what} has no events", "declare them: events=Events()") from None


__all__ = ["FencedPublisher", "Publisher", "check_there", "store_once"]
