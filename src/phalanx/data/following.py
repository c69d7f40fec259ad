"""Following: the log of an app is applied to this node's replica, as soon as it is written.

As in ``coord.watch`` nothing depends on a consumer: the live part is a core subscription to what the log
republishes, and what that misses is read by direct get. Sequences have no holes, so every loss is seen.

One task, owned by the follower, applies. It takes entries in order, from what was pushed where that goes on
just there, else from the log. Pushed entries are kept within bounds; what does not fit is read from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.data.confirming import Confirmation, Confirmer, confirmed
from phalanx.data.entries import Foreign, LogEntry, LogRecord, Seal, parse
from phalanx.data.history import History
from phalanx.data.log import PAGE_BYTES, WalLog
from phalanx.data.pushed import Pushed, entry_size
from phalanx.errors import BusError, BusTimeout, DatabaseError, PhalanxError, ReplicaUnavailable
from phalanx.names import Names
from phalanx.ports import Bus, Connection, Message, Record, Subscription
from phalanx.types import Position

__all__ = ["Confirmation", "Follower", "Replica", "confirmed"]

log = logging.getLogger("phalanx.following")

RESYNC_SECONDS = 30.0
"""Between looks at the end of the log that nothing asked for."""

RETRY_SECONDS = (0.02, 1.0)
BATCH = 32
"""Entries that are given to the replica at once, in order."""

BATCH_BYTES = 8 << 20
PUSH_SECONDS = 0.05
"""An entry of which somebody has heard should be pushed within this time, else it is looked for."""

MIN_PAGE_BYTES = 1 << 16
STOP_SECONDS = 5.0
RECORD_PREFIX = "record-"
HISTORY_FILE = "followed.json"


class Replica(Protocol):
    """What a follower applies to. Calls are carried out in the order in which they were made."""

    @property
    def position(self) -> Position:
        """How far it is."""
        ...

    @property
    def path(self) -> Path:
        """Its file; another one once it was made anew."""
        ...

    async def apply(self, sequence: int, txid: int, data: bytes | Path) -> object:
        """Apply an LTX file. Raises LtxError, DatabaseError."""
        ...

    async def skip(self, sequence: int) -> object:
        """There is nothing to apply at *sequence*."""
        ...

    async def sync(self) -> Position:
        """Put on disk what is applied; up to where."""
        ...


class Follower:
    """Follows for one replica, from where that is. Its owner calls :meth:`start` and :meth:`stop`.

    *on_trouble*: it has ended, since the replica cannot follow any more (the log begins later, holds
    something else than what was applied, or the replica failed): it has to be made anew. *on_applied* and
    *on_seal* are called after each step. *spool*: a folder for records too large for memory, and for the
    little that has to be remembered between two starts.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        replica: Replica,
        wal_log: WalLog,
        *,
        node: str,
        on_trouble: Callable[[str], None],
        on_applied: Callable[[Position], None] | None = None,
        on_seal: Callable[[Seal], None] | None = None,
        spool: Path | None = None,
    ) -> None:
        self._bus, self._app, self._replica, self._log = bus, app, replica, wal_log
        self._subject = f"{names.wal_watch(app)}.>"
        self._on_trouble, self._on_applied, self._on_seal = on_trouble, on_applied, on_seal
        self._spool = spool
        self._applied = Position()
        self._epoch = 0
        self._end = 0
        self._next = 1
        """The next entry to take; those between it and ``_applied`` are under way."""
        self._pushed = Pushed()
        self._history = History(wal_log, None if spool is None else spool / HISTORY_FILE)
        self._under_way_bytes = 0
        self._oldest: float | None = None
        self._page_bytes = PAGE_BYTES
        self._wake = asyncio.Event()
        self._retry = asyncio.Event()
        self._progress = asyncio.Event()
        self._unverified = True
        self._asked = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        self._is_stopped = False
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._confirmer = Confirmer(bus, names, app, node, sync=replica.sync, state=self._certain)

    # --- life

    async def start(self) -> None:
        """Begin to follow; returns when the end of the log is known. Raises BusError, then call it again.

        A replica that cannot follow is no error: see :attr:`trouble`.
        """
        self._is_stopped, self._unverified = False, True
        self._applied = self._replica.position
        self._history.open(str(self._replica.path))
        self._remove_leftovers()
        self._next, self._end = self._applied.sequence + 1, self._applied.sequence
        self._log.saw(self._applied.sequence)
        try:
            self._stop_listening = self._bus.on_connection(self._on_connection)
            self._subscription = await self._bus.subscribe(self._subject, self._on_message)
            with contextlib.suppress(DatabaseError):  # the task finds it again, and reports it
                await self._verify()
            await self._confirmer.start()
            self._task = asyncio.create_task(self._run(), name=f"{self._app} follower")
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Follow no more; harmless when done twice. The replica finishes what it was given, unless that takes
        longer than some seconds: then its position is told only by itself."""
        self._is_stopped = True
        if self._stop_listening is not None:
            self._stop_listening()
        await self._confirmer.stop()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if calls := set(self._calls):
            await asyncio.wait(calls, timeout=STOP_SECONDS)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        self._pushed.clear()
        self._report_progress()

    # --- what is so

    @property
    def applied(self) -> Position:
        """How far the replica is."""
        return self._applied

    @property
    def known_end(self) -> int:
        """The highest sequence that the log is known to have."""
        return self._end

    @property
    def trouble(self) -> str | None:
        """Why it does not follow: it has ended, or was stopped; None while it does."""
        return self._failure or ("following was stopped" if self._is_stopped else None)

    @property
    def epoch(self) -> int:
        """The epoch that wrote the last entry applied; 0 while that is unknown."""
        return self._epoch

    @property
    def lag_records(self) -> int:
        """How many entries are known and not applied."""
        return max(0, self._end - self._applied.sequence)

    @property
    def lag_bytes(self) -> int:
        """Their size, as far as they have arrived here."""
        return self._pushed.bytes + self._under_way_bytes

    @property
    def lag_seconds(self) -> float:
        """How long the oldest entry that is not applied has been in the log. The clocks of hosts matter
        only for entries that were stored while nobody listened here."""
        if not self.lag_records or self._oldest is None:
            return 0.0
        return max(0.0, system.now() - self._oldest)

    async def wait_for(self, sequence: int, timeout: float) -> None:
        """Wait until *sequence* is applied. Raises TimeoutError, at once when it is stopped meanwhile, and
        ReplicaUnavailable when it has ended by itself."""
        async with asyncio.timeout(timeout):
            has_asked = False
            while self._applied.sequence < sequence:
                if self._failure is not None:
                    raise ReplicaUnavailable(self._app, self._failure)
                if self._is_stopped:
                    raise TimeoutError("following was stopped")
                is_unheard_of = sequence > self._end and not has_asked
                if not await wait_at_most(self._progress, PUSH_SECONDS if is_unheard_of else None):
                    has_asked = True
                    self._ask()

    def _certain(self) -> tuple[int, int] | None:
        """What may be confirmed: nothing while it is not known that the log is still the one applied."""
        return None if self._unverified else (self._applied.sequence, self._epoch)

    # --- what is heard

    def _on_connection(self, event: Connection) -> None:
        if event in (Connection.CONNECTED, Connection.MISSED):
            self._ask()

    def _ask(self) -> None:
        """See to it that the end of the log, and that it is the same one, is made sure soon."""
        self._asked += 1
        self._unverified = True
        self._wake.set()
        self._retry.set()

    def _on_message(self, message: Message) -> None:
        headers = message.headers
        sequence = int(headers.get("Nats-Sequence", "0"))
        if not sequence:
            return  # not republished by a stream: somebody published by hand
        entry = parse(Record(headers.get("Nats-Subject", ""), message.data, sequence, headers))
        if sequence < self._next:
            if not self._history.knows(entry):
                self._ask()  # not what was taken there, or so long ago that nobody knows
            return
        if sequence > max(self._end, self._next - 1) + 1:
            self._bus.missed()
        self._pushed.add(entry)
        self._heard_of(sequence)

    def _heard_of(self, sequence: int) -> None:
        if self._oldest is None:
            self._oldest = system.now()
        self._end = max(self._end, sequence)
        self._log.saw(sequence)
        self._wake.set()

    # --- following

    async def _run(self) -> None:
        delay, longest = RETRY_SECONDS
        while True:
            try:
                await self._follow()
                delay = RETRY_SECONDS[0]
            except BusError as error:
                if isinstance(error, BusTimeout):
                    self._page_bytes = max(MIN_PAGE_BYTES, self._page_bytes // 4)  # a slow link
                log.debug("following app %s: %s", self._app, error)
                self._retry.clear()
                await wait_at_most(self._retry, delay * random.uniform(0.8, 1.2))
                delay = min(longest, 2 * delay)
            except PhalanxError as error:
                self._fail(str(error))
                return
            except Exception as error:
                log.exception("following app %s failed", self._app)
                self._fail(f"{type(error).__name__}: {error}")
                return

    async def _follow(self) -> None:
        """The next step: apply what is there, else see what is missing, else wait."""
        if self._unverified:
            await self._verify()
        elif entries := self._take():
            await self._apply(entries)
        elif self._end >= self._next:
            await self._catch_up()
        elif not await wait_at_most(self._wake, RESYNC_SECONDS * random.uniform(0.8, 1.2)):
            await self._verify()
        self._wake.clear()

    def _take(self) -> list[LogEntry]:
        """Pushed entries from the next one on, as many as go on without a hole, within a batch."""
        entries: list[LogEntry] = []
        size = 0
        while len(entries) < BATCH and size < BATCH_BYTES:
            found = self._pushed.take(self._next)
            if found is None:
                break
            if not entries:
                self._oldest = found[1]
            entries.append(found[0])
            size += entry_size(found[0])
            self._is_taken(found[0])
        self._under_way_bytes = size
        return entries

    def _is_taken(self, entry: LogEntry) -> None:
        self._next = entry.sequence + 1
        self._history.take(entry)

    async def _verify(self) -> None:
        """Learn the end of the log, and that it still is the log that was applied here.

        Raises DatabaseError if it is not: it begins later, ends earlier, or holds something else.
        """
        asked = self._asked
        state = await self._log.state()
        end = state.last
        if end < max(self._end, self._applied.sequence):
            end = (await self._log.last()).sequence  # raises LogWentBack, once it is certain
        if state.first > self._next:
            raise DatabaseError(
                f"the log begins at {state.first}, the replica is at {self._applied.sequence}"
            )
        if state.first:  # else nothing was ever in it
            self._epoch = await self._history.verify(self._applied, state.first) or self._epoch
        if end >= self._next:
            self._heard_of(end)
        if asked == self._asked:
            self._unverified = False
        self._confirmer.progress()

    # --- catching up

    async def _catch_up(self) -> None:
        """Read and apply until what is pushed goes on, or the end. A page is read while one is applied."""
        reading = self._read()
        try:
            while True:
                page = await reading
                if not page:
                    raise BusError("read the log", "the replica that answers is behind")
                if page[0].sequence > self._next:
                    raise DatabaseError(
                        f"the log goes on at {page[0].sequence}, the replica is at {self._applied.sequence}"
                    )
                page = [each for at, each in enumerate(page) if each.sequence == self._next + at]
                for each in page:
                    self._pushed.take(each.sequence)
                    self._is_taken(each)
                is_last = self._next > self._end or self._next in self._pushed or self._unverified
                if not is_last:
                    reading = self._read()
                self._oldest = _stored_at(page[0])
                await self._apply(page)
                self._page_bytes = min(PAGE_BYTES, 2 * self._page_bytes)
                if is_last:
                    return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _read(self) -> asyncio.Task[list[LogEntry]]:
        limit = min(1024, max(1, self._end - self._next + 1))
        return asyncio.create_task(
            self._log.read(self._next, limit=limit, max_bytes=self._page_bytes), name=f"{self._app} log page"
        )

    # --- applying

    async def _apply(self, entries: Sequence[LogEntry]) -> None:
        """Apply *entries*, which go on from what is applied. What failed is taken again the next time."""
        try:
            at = 0
            while at < len(entries):
                batch = _batch(entries, at)
                await self._apply_batch(batch)
                at += len(batch)
        except BaseException:
            self._next = self._applied.sequence + 1
            raise
        finally:
            self._under_way_bytes = 0
            if self._applied.sequence >= self._end:
                self._oldest = None

    async def _apply_batch(self, batch: Sequence[LogEntry]) -> None:
        calls = [self._call_replica(each) for each in batch]
        results = await asyncio.gather(*(asyncio.shield(call) for call in calls), return_exceptions=True)
        for entry, result in zip(batch, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            self._has_applied(entry)

    def _call_replica(self, entry: LogEntry) -> asyncio.Task[None]:
        """A task of its own: the replica carries out what it was given, also if this follower is stopped."""
        call = asyncio.create_task(self._apply_one(entry), name=f"{self._app} apply {entry.sequence}")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _apply_one(self, entry: LogEntry) -> None:
        if isinstance(entry, LogRecord):
            if entry.pointer is None:
                await self._replica.apply(entry.sequence, entry.txid, entry.data)
            else:
                await self._apply_object(entry)
            return
        if isinstance(entry, Foreign):
            log.error("app %s: the log holds something foreign at %d: %s", self._app, entry.sequence, entry)
        await self._replica.skip(entry.sequence)

    def _remove_leftovers(self) -> None:
        """Downloads of a node that died."""
        for path in () if self._spool is None else self._spool.glob(f"{RECORD_PREFIX}*"):
            path.unlink(missing_ok=True)

    async def _apply_object(self, record: LogRecord) -> None:
        with tempfile.NamedTemporaryFile(prefix=RECORD_PREFIX, suffix=".ltx", dir=self._spool) as file:
            await self._log.download(record, Path(file.name))
            await self._replica.apply(record.sequence, record.txid, Path(file.name))

    def _has_applied(self, entry: LogEntry) -> None:
        txid = self._applied.txid
        if isinstance(entry, Seal | LogRecord):
            self._epoch, txid = entry.epoch, entry.txid
        self._applied = Position(entry.sequence, txid)
        self._history.applied(entry, str(self._replica.path))
        if isinstance(entry, Seal) and self._on_seal is not None:
            self._call(self._on_seal, entry)
        self._report_progress()
        if self._on_applied is not None:
            self._call(self._on_applied, self._applied)

    def _call(self, callback: Callable[..., object], argument: object) -> None:
        try:
            callback(argument)
        except Exception:
            log.exception("following app %s: a callback failed", self._app)

    def _report_progress(self) -> None:
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()
        self._confirmer.progress()

    def _fail(self, reason: str) -> None:
        log.error("app %s: the replica at %s cannot follow: %s", self._app, self._applied, reason)
        self._failure = reason
        self._unverified = True
        self._report_progress()
        self._call(self._on_trouble, reason)


def _batch(entries: Sequence[LogEntry], at: int) -> Sequence[LogEntry]:
    """The next entries to apply at once; one that has to be fetched from the object store is alone."""
    size, end = 0, at
    while end < len(entries) and end - at < BATCH and size < BATCH_BYTES:
        entry = entries[end]
        if isinstance(entry, LogRecord) and entry.pointer is not None:
            break
        size += entry_size(entry)
        end += 1
    return entries[at : max(end, at + 1)]


def _stored_at(entry: LogEntry) -> float:
    """When *entry* was stored, on this host's steady clock."""
    age = system.wall() - entry.time if entry.time else 0.0
    return system.now() - max(0.0, age)
