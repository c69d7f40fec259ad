"""A watch without a consumer: republished messages, and catch-ups by direct get.

A consumer whose server died is dumb until JetStream's meta group has a new leader; this is not. The
live part is a core subscription to what the stream republishes. It may miss messages, so the state is
read by direct get at the start, after every reconnection, after a gap in a subject's sequence, and now
and then to be sure.

One task, owned by the watch, does the catch-ups.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.errors import BusError
from phalanx.ports import Bus, Connection, Message, Record, Subscription, is_removed

log = logging.getLogger("phalanx.watch")

RESYNC_SECONDS = 30.0
"""Between catch-ups that nothing asked for."""

RETRY_SECONDS = (0.05, 1.0)

OnCatchUp = Callable[[list[Record], bool, float], None]
"""All records, whether the watch may have missed some before, and when the catch-up was asked for."""


class Watch:
    """Everything that is stored under *subjects* of *stream*, now and later.

    *watch_prefix*: where the stream republishes the part of the subjects before ``.>`` (or the very
    subject where there is no ``.>``). *on_record* gets each record; with *monotonic* each revision at
    most once, growing for each subject, and a record that is ``removed`` for one that has vanished.
    Without *monotonic* it gets all live records as they come, and *on_catch_up* the catch-ups: for
    those who must know that a server has lost its last writes.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        subjects: str,
        *,
        watch_prefix: str,
        on_record: Callable[[Record], None],
        on_catch_up: OnCatchUp | None = None,
        monotonic: bool = True,
    ) -> None:
        self._bus, self._stream, self._subjects = bus, stream, subjects
        self._subject = f"{watch_prefix}.>" if subjects.endswith(".>") else watch_prefix
        self._on_record, self._on_catch_up, self._monotonic = on_record, on_catch_up, monotonic
        self._revisions: dict[str, tuple[int, float]] = {}
        self._asked = asyncio.Event()
        self._interrupted = True
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._caught_up = asyncio.Event()
        self._closed = False

    async def start(self) -> None:
        """Begin to watch; returns when the present state has been delivered. Cancel it to give up."""
        try:
            self._stop_listening = self._bus.on_connection(self._on_connection)
            self._subscription = await self._bus.subscribe(self._subject, self._on_message)
            if self._closed:
                await self.close()
                return
            self._asked.set()
            self._task = asyncio.create_task(self._run(), name=f"watch {self._subjects}")
            await self._caught_up.wait()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """No longer watch; a :meth:`start` that waits returns. Harmless when done twice."""
        self._closed = True
        self._caught_up.set()
        if self._stop_listening is not None:
            self._stop_listening()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    # --- live

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self._ask(interrupted=True)
        elif event is Connection.MISSED:
            self._ask(interrupted=False)

    def forget(self, subject: str) -> None:
        """Hear again what is stored there now, whichever revision it has."""
        self._revisions.pop(subject, None)
        self._ask(interrupted=False)

    def refresh(self) -> None:
        """Read the state again, soon."""
        self._ask(interrupted=False)

    def _ask(self, *, interrupted: bool) -> None:
        self._interrupted = self._interrupted or interrupted
        self._asked.set()

    def _on_message(self, message: Message) -> None:
        headers = message.headers
        subject, revision = headers.get("Nats-Subject", ""), int(headers.get("Nats-Sequence", "0"))
        if not revision:
            return  # not republished by a stream: somebody published by hand
        known = self._revisions.get(subject, (0, 0.0))[0]
        if int(headers.get("Nats-Last-Sequence", "0")) > known:
            # Whatever lost this message may have lost those of other watches, too.
            self._ask(interrupted=True)
            self._bus.missed()
        self._deliver(Record(subject, message.data, revision, headers, 0.0, is_removed(headers)))

    def _deliver(self, record: Record) -> None:
        known = self._revisions.get(record.subject)
        if known is not None and record.revision <= known[0] and self._monotonic:
            return
        if record.removed and not self._monotonic:
            self._revisions.pop(record.subject, None)
        else:
            self._revisions[record.subject] = (record.revision, system.now())
        try:
            self._on_record(record)
        except Exception:
            log.exception("the record %s could not be handled", record.subject)

    # --- catching up

    async def _run(self) -> None:
        while True:
            await wait_at_most(self._asked, RESYNC_SECONDS * random.uniform(0.8, 1.2))
            self._asked.clear()
            interrupted, self._interrupted = self._interrupted, False
            await self._catch_up(interrupted)
            self._caught_up.set()

    async def _catch_up(self, interrupted: bool) -> None:
        delay, longest = RETRY_SECONDS
        while True:
            asked_at = system.now()
            try:
                records = await self._bus.snapshot(self._stream, self._subjects)
                if self._monotonic:
                    await self._find_vanished(records, asked_at)
                    await self._find_older(records, asked_at)
                break
            except BusError as error:
                log.debug("catching up with %s: %s", self._subjects, error)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(longest, 2 * delay)
        if self._on_catch_up is not None:
            for record in records:
                self._revisions[record.subject] = (record.revision, system.now())
            try:
                self._on_catch_up(records, interrupted, asked_at)
            except Exception:
                log.exception("the state of %s could not be handled", self._subjects)
            return
        for record in records:
            self._deliver(record)

    async def _find_older(self, records: list[Record], asked_at: float) -> None:
        """What is older than what was seen before: a replica that lags, or servers that have lost writes."""
        for record in records:
            revision, received_at = self._revisions.get(record.subject, (0, 0.0))
            if record.revision >= revision or received_at >= asked_at:
                continue
            found = await self._bus.read(self._stream, record.subject)
            if found is not None and found.revision < revision:
                log.error("%s went back from revision %d to %d", record.subject, revision, found.revision)
                self._revisions.pop(record.subject, None)
                self._deliver(found)

    async def _find_vanished(self, records: list[Record], asked_at: float) -> None:
        """Report as removed what was there and has vanished without a marker that we have seen."""
        present = {record.subject for record in records}
        gone = [s for s, (_, at) in self._revisions.items() if s not in present and at < asked_at]
        for subject in gone:
            # A replica that lags may have answered the direct get: only the leader knows.
            if await self._bus.read(self._stream, subject) is None:
                revision, _ = self._revisions.pop(subject)
                self._on_record(Record(subject, b"", revision, removed=True))
