"""Every change of a bucket from a revision on, in the order of the revisions, without a consumer.

A bucket is a stream, so revisions number the messages of *all* its keys. Therefore this listens to
everything that the bucket republishes: if each message carries the number after the last one, nothing is
missing, of no key. Wherever a number is missing (at the start, after a reconnection, when messages were lost,
or when the consumer was too slow) the log is read by direct get up to where its leader is. Only what
matches is kept.

What may be missing from the log itself: a bucket keeps a number of revisions of each key (``history``), and
drops the oldest. If fewer than *history* of a key are found, none of that key was dropped. If there are
*history* or more, it can't be known: that is RevisionCompacted. A message with a rollup (a purge, a write
with a TTL, the marker of a TTL's end) has taken the place of all before it, on purpose: counting begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.errors import BusError, RevisionCompacted
from phalanx.ports import Bus, Connection, Message, Record, Subscription, is_removed

log = logging.getLogger("phalanx.kv")

RESYNC_SECONDS = 30.0
"""Between looks at the log that nothing asked for."""

RETRY_SECONDS = (0.02, 1.0)
PAGE = 512
PAGE_BYTES = 8 << 20
"""How much one read of the log brings at most, about."""

MAX_PENDING = 1024
"""Messages that are kept while the log is read; later ones are read from the log in their turn."""

STALLED_SECONDS = 1.0
"""How long an end of the log that was announced is waited for, before something new is put there."""


class BucketLog:
    """The records of *stream* (all its subjects: *subjects*) after revision *since* that are *wanted*.

    *watch_prefix*: where the stream republishes. *barrier*: a subject of the stream that may be written to
    without harm. *prefix*: what stands before the keys that users know. *on_record* gets each record once,
    in order, and says whether it takes more at present: if not, :meth:`resume` says when. *on_failed* gets
    what ended the watch, RevisionCompacted.

    One task, owned by this, reads the log.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        subjects: str,
        *,
        watch_prefix: str,
        barrier: str,
        prefix: str,
        since: int,
        wanted: Callable[[str], bool],
        on_record: Callable[[Record], bool],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._bus, self._stream, self._subjects = bus, stream, subjects
        self._barrier, self._prefix = barrier, prefix
        self._watch_subject = f"{watch_prefix}.>"
        self._wanted, self._on_record, self._on_failed = wanted, on_record, on_failed
        self.position = since
        """Everything that was stored up to this revision has been given to *on_record*."""
        self._goal = since
        self._behind = True
        self._pending: list[Record] = []
        self._expiring: dict[str, int] = {}
        self._unsure = False
        self._failed = False
        self._asked = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._settled = asyncio.Event()
        self._subscription: Subscription | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; returns when all changes up to now were given, or it failed. Cancel it to give up."""
        try:
            self._stop_listening = self._bus.on_connection(self._on_connection)
            self._subscription = await self._bus.subscribe(self._watch_subject, self._on_message)
            self._asked.set()
            self._task = asyncio.create_task(self._run(), name=f"log of {self._stream}")
            await self._settled.wait()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """No longer watch. Harmless when done twice."""
        if self._stop_listening is not None:
            self._stop_listening()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        self._settled.set()

    def resume(self) -> None:
        """The consumer takes more."""
        self._room.set()

    # --- live

    def _on_connection(self, event: Connection) -> None:
        if event in (Connection.CONNECTED, Connection.MISSED):
            self._ask()

    def _ask(self) -> None:
        self._behind = True
        self._asked.set()

    def _on_message(self, message: Message) -> None:
        headers = message.headers
        revision = int(headers.get("Nats-Sequence", "0"))
        if self._failed or revision <= self.position:
            return  # known; or not republished by a stream: somebody published by hand
        subject = headers.get("Nats-Subject", "")
        data = message.data if self._wanted(subject) else b""
        record = Record(subject, data, revision, headers, 0.0, is_removed(headers))
        if not self._behind and revision == self.position + 1:
            self._take(record)
            return
        if not self._behind:
            # Whatever lost messages may have lost those of other watches, too.
            self._ask()
            self._bus.missed()
        self._goal = max(self._goal, revision)
        if len(self._pending) < MAX_PENDING:
            self._pending.append(record)

    def _take(self, record: Record) -> None:
        """The next record of the log."""
        self.position = record.revision
        if not self._wanted(record.subject):
            return
        if "Nats-TTL" in record.headers and not record.removed:
            self._expiring[record.subject] = record.revision
        else:
            self._expiring.pop(record.subject, None)
        if not self._on_record(record):
            self._room.clear()
            self._ask()

    # --- reading the log

    async def _run(self) -> None:
        try:
            while True:
                await wait_at_most(self._asked, RESYNC_SECONDS * random.uniform(0.8, 1.2))
                self._asked.clear()
                self._behind = True
                await self._room.wait()
                await self._catch_up()
                self._settled.set()
        except RevisionCompacted as error:
            self._fail(error)
        except Exception as error:
            log.exception("the log of %s cannot be followed", self._stream)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._pending.clear()
        self._on_failed(error)
        self._settled.set()

    async def _catch_up(self) -> None:
        delay, longest = RETRY_SECONDS
        while True:
            try:
                await self._read()
                await self._find_expired()
                break
            except BusError as error:
                log.debug("reading the log of %s: %s", self._stream, error)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(longest, 2 * delay)
        pending, self._pending = self._pending, []
        self._behind = self._asked.is_set()
        for record in pending:
            # In their turn they are either known, or next, or show that some are missing.
            self._on_message(_message(record))

    async def _read(self) -> None:
        """Take what the log holds after our position, up to where its leader was asked last."""
        found: list[Record] = []
        position, seen = self.position, 0
        last, history = await self._last()
        began, delay = system.now(), RETRY_SECONDS[0]
        most_bytes = max(PAGE_BYTES, 2 * self._bus.max_payload)
        while True:
            page = await self._bus.read_log(
                self._stream, self._subjects, start=position + 1, limit=PAGE, max_bytes=most_bytes
            )
            seen += len(page)
            found.extend(record for record in page if self._wanted(record.subject))
            position = page[-1].revision if page else position
            if len(page) == PAGE or _size(page) + self._bus.max_payload >= most_bytes:
                # Cut off: whoever answered had more. Only an answer that is complete, and from a later state
                # than all before it, shows whether anything was dropped on the way.
                last = await self._bus.write(self._barrier)
                continue
            if position >= last:
                break
            if system.now() - began > STALLED_SECONDS:
                # What is waited for may have vanished with its time. This will not.
                last = await self._bus.write(self._barrier)
                began = system.now()
            await asyncio.sleep(delay)  # a replica that lags has answered
            delay = min(0.2, 2 * delay)
        _check_complete(found, self.position, history, self._prefix)
        self._unsure = self._unsure or seen < position - self.position
        for record in found:
            self._take(record)
        self.position = position

    async def _last(self) -> tuple[int, int]:
        """The stream's last revision by its leader's word, and how many of each subject it keeps."""
        info: dict[str, Any] = await self._bus.api(f"STREAM.INFO.{self._stream}", {}, timeout=2.0)
        last, history = int(info["state"]["last_seq"]), int(info["config"]["max_msgs_per_subject"])
        if last < self.position:
            # A leader that was deposed and doesn't know, or the bucket was made anew. Only a write tells.
            last = await self._bus.write(self._barrier)
            if last <= self.position:
                raise RevisionCompacted(
                    "", self.position, f"the bucket is only at {last}: it was made anew, or has lost writes"
                )
        return max(last, self._goal), history

    async def _find_expired(self) -> None:
        """Give the end of TTLs whose marker, which is there for a second only, may have been missed."""
        if not self._unsure:
            return
        for subject, revision in list(self._expiring.items()):
            if await self._bus.read(self._stream, subject) is None and self._expiring.pop(subject, None):
                self._on_record(Record(subject, b"", revision, removed=True))
        self._unsure = False


def _check_complete(records: list[Record], since: int, history: int, prefix: str) -> None:
    """Raise RevisionCompacted if the stream may have dropped some that would belong among *records*.

    If one was dropped before it could be read, *history* newer ones were there, which lay ahead of the
    reader: either they were read, or as many again, newer still, took their place.
    """
    counts: dict[str, int] = {}
    for record in records:
        rolled_up = "Nats-Rollup" in record.headers
        counts[record.subject] = 0 if rolled_up else counts.get(record.subject, 0) + 1
    for subject, count in counts.items():
        if count >= history > 0:
            raise RevisionCompacted(
                subject.removeprefix(prefix),
                since,
                f"it was changed {count} times or more, and {history} are kept",
            )


def _size(records: list[Record]) -> int:
    return sum(len(record.data) for record in records)


def _message(record: Record) -> Message:
    return Message(record.subject, record.data, record.headers)
