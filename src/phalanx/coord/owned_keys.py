"""The keys that say which session owns what: taken, given back and read as their rules ask for it.

It decides nothing: :mod:`phalanx.decide.ring_ownership` does. What it asks of single keys is pipelined, so
that hundreds change hands within some round trips to NATS.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import msgspec

from phalanx.aio import Background
from phalanx.coord.complaints import Complaints
from phalanx.decide.ring_ownership import Ownership, PartitionBody, Read, Write
from phalanx.errors import BusError, WrongRevision
from phalanx.ports import Bus, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.ring")

MOST_UNDER_WAY = 64
"""Requests about single keys that wait for an answer at a time: half as many after each that nobody
answered, one more after each write. Else thousands of them would keep a slow server from answering any."""

REQUEST_TIMEOUT_SECONDS = 2.0
RETRY_SECONDS = 0.1
STALE_SECONDS = 0.2
"""An answer older than what was seen may be that of a server which does not know yet that it leads no more:
it is asked for again after this."""

_body_of = msgspec.json.Decoder(PartitionBody).decode
_encode = msgspec.json.Encoder().encode


class OwnedKeys:
    """Carries out what *own* wants written and read, and reports to it what came of that.

    *subject*: where the key with that number is stored, in *stream*. *forget*: have the watch of them believe
    what it is told next of a subject, however old. *on_answer*: told of whatever there is to act on anew.
    """

    def __init__(
        self,
        bus: Bus,
        app: str,
        own: Ownership,
        stream: str,
        complaints: Complaints,
        *,
        subject: Callable[[int], str],
        forget: Callable[[str], None],
        on_answer: Callable[[], None],
    ) -> None:
        self._bus, self._app, self._own, self._stream = bus, app, own, stream
        self._subject, self._forget, self._on_answer = subject, forget, on_answer
        self._waiting: deque[Write | Read] = deque()
        """At most one for each key."""
        self._under_way, self._window = 0, MOST_UNDER_WAY
        self._complaints = complaints
        self._background = Background(log)

    def carry_out(self, action: Write | Read) -> None:
        """Do that, as soon as not too many others are under way."""
        self._waiting.append(action)
        self._send()

    async def close(self) -> None:
        """Let go of what is under way: it may be stored at any later moment."""
        self._waiting.clear()  # else what is cancelled would begin the next
        await self._background.close()

    def _send(self) -> None:
        while self._waiting and self._under_way < self._window:
            action = self._waiting.popleft()
            self._under_way += 1
            work = self._write(action) if isinstance(action, Write) else self._read(action)
            self._background.spawn(work, f"ring {self._app} partition")

    async def _write(self, action: Write) -> None:
        number, body = action.partition, PartitionBody(self._own.me if action.take else None)
        revision = None
        try:
            revision = await self._bus.write(
                self._subject(number),
                _encode(body),
                expect=action.expected_revision,
                timeout=REQUEST_TIMEOUT_SECONDS,
            )
        except WrongRevision:
            pass
        except BusError as error:
            await self._unanswered("the key of a partition", error)
        finally:
            # However it ended: what is not known to be stored has to be read.
            if revision is None:
                self._own.on_not_written(number)
            else:
                self._own.on_written(number, revision, take=action.take)
                self._window = min(MOST_UNDER_WAY, self._window + 1)
                self._complaints.clear()
            self._answered()

    async def _read(self, action: Read) -> None:
        number = action.partition
        found = None
        try:
            found = await self._stored_now(number)
        except BusError as error:
            await self._unanswered("reading the key of a partition", error)
        finally:
            if found is None:
                self._own.on_not_read(number)
            else:
                self._own.on_read(number, *found)
            self._answered()

    async def _stored_now(self, number: int) -> tuple[int, SessionId | None]:
        """What the stream's leader has, asked twice where that is older than what was seen."""
        revision, session = await self._stored(number)
        if revision < self._own.holder(number)[0]:
            await asyncio.sleep(STALE_SECONDS)
            revision, session = await self._stored(number)
        if revision < self._own.holder(number)[0]:
            log.error("app %s: partition %d went back to revision %d", self._app, number, revision)
            self._forget(self._subject(number))
        return revision, session

    async def _unanswered(self, what: str, error: BusError) -> None:
        """It is tried again a moment later."""
        self._window = max(1, self._window // 2)
        self._complaints.tell(what, error)
        await asyncio.sleep(RETRY_SECONDS)

    def _answered(self) -> None:
        self._under_way -= 1
        self._send()
        self._on_answer()

    async def _stored(self, number: int) -> tuple[int, SessionId | None]:
        """What the stream's leader has."""
        record = await self._bus.read(self._stream, self._subject(number), timeout=REQUEST_TIMEOUT_SECONDS)
        return (record.revision, holder_in(record)) if record is not None else (0, None)


def holder_in(record: Record) -> SessionId | None:
    """Whose the key is that *record* stores."""
    return None if record.removed else _body_of(record.data).session


__all__ = ["RETRY_SECONDS", "OwnedKeys", "holder_in"]
