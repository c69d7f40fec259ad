"""The audit log: every decision with its reason, epoch, node and duration, in JetStream.

An entry goes to a spool on disk first, and from there to NATS in the order in which it was recorded. So
nothing is lost while NATS is away, and nothing that decides ever waits for NATS.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.observe.spool import Spool
from phalanx.ports import Bus, Connection, Record
from phalanx.types import is_dns_label

log = logging.getLogger("phalanx.audit")

ENTRIES_LOST = "entries-lost"
"""Action (category ``audit``) of the entry that says how many others were lost: ``details["lost"]``."""

_MAX_REASON = 1000
_MAX_DETAILS = 32
_MAX_DETAIL = 200
_MAX_LINE = 8000
_MAX_PENDING = 512
_LINGER_SECONDS = 0.05
_RETRY_SECONDS = (0.1, 5.0)
_SKEW_SECONDS = 60.0
_POLL_SECONDS = 3.0
_CALL_SECONDS = 8.0
"""Longer than any deadline of the bus: only for calls that hang in spite of theirs."""

_AFTER_WAKE_SECONDS = (0.002, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
"""A node hears of an entry before the stream's servers have stored it."""
_REMEMBERED = 10_000


class AuditEntry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One thing that happened. ``time`` is Unix seconds by the clock of ``node``.

    ``app`` is empty and ``epoch`` 0 where they do not apply. ``id`` is unique for ever.
    """

    id: str
    time: float
    node: str
    category: str
    action: str
    app: str = ""
    epoch: int = 0
    reason: str = ""
    duration_seconds: float | None = None
    details: dict[str, str] = {}

    @property
    def name(self) -> str:
        """``<category>.<action>``."""
        return f"{self.category}.{self.action}"


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AuditEntry).decode


class AuditLog:
    """The audit log of one node. Only for the thread of the event loop.

    Entries wait in files of *spool_dir* (at most *max_spool_bytes*) until NATS has acknowledged them, so
    they survive a crash of the process: the next start delivers what this one did not. They are NOT
    synced to disk one by one, so the last seconds before a loss of power may be missing.

    When the spool is full the oldest entries give way, and an ``audit.entries-lost`` entry says how many.
    While the disk refuses to take them, the newest few hundred wait in memory.
    """

    def __init__(
        self, names: Names, node: str, spool_dir: Path, *, max_spool_bytes: int = 16 * 1024 * 1024
    ) -> None:
        self._names, self._node = names, node
        self._prefix = f"{node}-{secrets.token_hex(6)}"
        self._numbers = itertools.count(1)
        self._pending: deque[bytes] = deque()
        """Younger than all that is in the spool; filled while the disk refuses."""
        self._forgotten = 0
        self._disk_works = True
        self._recorded, self._settled = asyncio.Event(), asyncio.Event()
        self._taken_count = 0
        self._spool = Spool(
            spool_dir,
            max_spool_bytes,
            is_line=_is_entry,
            on_dropped=self._on_dropped,
            on_damage=self._on_damage,
        )
        self._taken_count += len(self._spool)
        if left := len(self._spool):
            log.info("%d audit entries of an earlier run are still to be delivered", left)

    @property
    def undelivered(self) -> int:
        """How many entries NATS has not acknowledged yet."""
        return len(self._spool) + len(self._pending)

    # --- recording

    def record(
        self,
        category: str,
        action: str,
        *,
        app: str = "",
        epoch: int = 0,
        reason: str = "",
        duration_seconds: float | None = None,
        **details: object,
    ) -> None:
        """Note that something happened. Returns at once: it neither waits for NATS nor syncs the disk.

        Trouble with the disk is logged, not raised. Over-long texts are cut. Raises ValueError if
        *category* or *action* is no DNS label.
        """
        for what, text in (("category", category), ("action", action)):
            if not is_dns_label(text):
                raise ValueError(f"audit {what} {text!r} is no DNS label (like 'leader-acquired')")
        entry = self._entry(category, action, details, app, epoch, reason, duration_seconds)
        line = _encode(entry)
        if len(line) > _MAX_LINE:
            line = _encode(
                msgspec.structs.replace(entry, reason=entry.reason[:200], details={"cut": "too long"})
            )
        self._keep(line)
        self._recorded.set()

    def _entry(
        self,
        category: str,
        action: str,
        details: dict[str, object],
        app: str = "",
        epoch: int = 0,
        reason: str = "",
        duration_seconds: float | None = None,
    ) -> AuditEntry:
        return AuditEntry(
            id=f"{self._prefix}-{next(self._numbers)}",
            time=round(system.wall(), 6),
            node=self._node,
            category=category,
            action=action,
            app=_text(app, 63),
            epoch=epoch,
            reason=_text(reason, _MAX_REASON),
            duration_seconds=duration_seconds,
            details={
                _text(key, 63): _text(value, _MAX_DETAIL)
                for key, value in itertools.islice(details.items(), _MAX_DETAILS)
            },
        )

    def _keep(self, line: bytes) -> None:
        self._pending.append(line)
        self._taken_count += 1
        self._spill()
        while len(self._pending) > _MAX_PENDING:
            self._forgotten += _weight(self._pending.popleft())

    def _spill(self) -> None:
        """Move what waits in memory to the disk, oldest first."""
        try:
            while self._pending:
                if self._forgotten:
                    self._note_forgotten()
                self._spool.append(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if self._disk_works:
                log.error("the audit spool cannot be written: %s; entries wait in memory", error)
            self._disk_works = False
        else:
            if not self._disk_works:
                log.info("the audit spool can be written again")
            self._disk_works = True

    def _note_forgotten(self) -> None:
        lost, self._forgotten = self._forgotten, 0
        self._pending.appendleft(self._lost(lost, "the spool could not be written"))
        self._taken_count += 1

    def _on_dropped(self, lines: Sequence[bytes]) -> bytes:
        count = sum(_weight(line) for line in lines)
        log.error("the audit spool is full: %d old entries are lost", count)
        self._taken_count += 1
        return self._lost(count, "the spool was full")

    def _on_damage(self, problem: str, lost: int) -> None:
        log.error("audit spool: %s", problem)
        # Not into the spool: it may be in the middle of something. The next record() moves it there.
        self._pending.append(
            self._lost(lost, problem)
            if lost
            else _encode(self._entry("audit", "spool-damaged", {}, reason=problem))
        )
        self._taken_count += 1
        self._recorded.set()

    def _lost(self, count: int, reason: str) -> bytes:
        return _encode(self._entry("audit", ENTRIES_LOST, {"lost": count}, reason=reason))

    # --- delivering

    async def run(self, bus: Bus) -> None:
        """Deliver entries, one after the other, until cancelled. Cancelling loses nothing.

        An entry whose outcome is unknown is sent again under the same ``Nats-Msg-Id``, so that the server
        drops the second one; readers drop it by its id where the server's window was over.
        """
        reconnected = asyncio.Event()

        def on_connection(event: Connection) -> None:
            if event is Connection.CONNECTED:
                reconnected.set()

        stop_listening = bus.on_connection(on_connection)
        delay, longest = _RETRY_SECONDS
        problem = ""
        try:
            while True:
                _heed_cancellation()
                self._recorded.clear()
                if (line := self._next()) is None:
                    await self._recorded.wait()
                    # What records an entry is in the middle of a failover: its own requests go first.
                    await asyncio.sleep(_LINGER_SECONDS)
                    continue
                reconnected.clear()
                try:
                    await self._deliver(bus, line)
                except Exception as error:
                    # Whatever it is: it must cost neither the entry nor the node.
                    if not problem:
                        trace = None if isinstance(error, BusError) else error
                        log.warning(
                            "audit entries wait on disk, %d so far: %s",
                            self.undelivered,
                            error,
                            exc_info=trace,
                        )
                    problem = str(error) or type(error).__name__
                    await wait_at_most(reconnected, delay)
                    delay = min(longest, 2 * delay)
                    continue
                self._done(line)
                delay = _RETRY_SECONDS[0]
                if problem and not self.undelivered:
                    log.info("all audit entries are delivered")
                    problem = ""
        finally:
            stop_listening()

    async def flush(self, timeout: float) -> bool:
        """Wait until all that was recorded before this call is delivered (:meth:`run` must be running).

        False if *timeout* seconds were not enough; then it waits on disk for the next start.
        """
        target = self._taken_count
        try:
            async with asyncio.timeout(timeout):
                while self.undelivered > self._taken_count - target:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Close the spool's files, after :meth:`run` has ended."""
        self._spill()
        self._spool.close()

    def _next(self) -> bytes | None:
        """The oldest undelivered entry."""
        line = self._spool.peek()
        if line is None and self._pending:
            self._spill()
            line = self._spool.peek()
        if line is None and self._pending:
            if self._forgotten:
                self._note_forgotten()
            line = self._pending[0]
        return line

    async def _deliver(self, bus: Bus, line: bytes) -> None:
        entry = _decode(line)
        subject = self._names.audit_subject(entry.category, entry.action)
        async with asyncio.timeout(_CALL_SECONDS):
            await bus.write(subject, line, headers={"Nats-Msg-Id": entry.id})

    def _done(self, line: bytes) -> None:
        try:
            moved = self._spool.delivered(line)
        except OSError as error:
            # It has moved on in memory; only the next start would send this entry again.
            log.error("the position in the audit spool cannot be written: %s", error)
            moved = True
        if not moved and self._pending and self._pending[0] is line:
            self._pending.popleft()
        self._settled.set()


# --- reading


async def read_audit(
    bus: Bus, names: Names, *, since: float | None = None, limit: int = 100
) -> list[AuditEntry]:
    """The newest *limit* entries of the platform, oldest first, in the order in which NATS stored them.

    *since*: only entries with that time (Unix seconds) or a later one. Raises BusError.
    """
    kept: deque[AuditEntry] = deque(maxlen=max(1, limit))
    seen = _Seen()
    start, start_time = 1, None
    if since is not None:
        start_time = max(0.0, since - _SKEW_SECONDS)
    else:
        _, last = await _bounds(bus, names)
        start = max(1, last - limit + 1)
    while page := await bus.read_log(
        names.audit_stream, names.audit_subjects, start=start, start_time=start_time
    ):
        start, start_time = page[-1].revision + 1, None
        kept.extend(seen.new_entries(page, since))
    return list(kept)


async def follow_audit(bus: Bus, names: Names, *, since: float | None = None) -> AsyncIterator[AuditEntry]:
    """Each entry once, in the stream's order, for ever: from *since* (Unix seconds) on, else new ones only.

    It goes on after losses of the connection. A message on the audit subjects only wakes it up; what it
    yields is read from the stream. Raises BusError only if the start can't be found.
    """
    start, start_time = 1, since
    if since is None:
        start = (await _bounds(bus, names))[1] + 1
    else:
        start_time = max(0.0, since - _SKEW_SECONDS)
    seen, wake = _Seen(), asyncio.Event()
    subscription = await bus.subscribe(names.audit_subjects, lambda _: wake.set())
    stop_listening = bus.on_connection(lambda _: wake.set())
    pauses: deque[float] = deque()
    try:
        while True:
            _heed_cancellation()
            try:
                async with asyncio.timeout(_CALL_SECONDS):
                    page = await bus.read_log(
                        names.audit_stream, names.audit_subjects, start=start, start_time=start_time
                    )
                    if not page and not pauses and await _was_made_anew(bus, names, start):
                        start, start_time = 1, None
                        continue
            except (BusError, TimeoutError) as error:
                log.debug("following the audit log: %s", error)
                page = []
            if page:
                start, start_time = page[-1].revision + 1, None
                for entry in seen.new_entries(page, since):
                    yield entry
                continue
            if await wait_at_most(wake, pauses.popleft() if pauses else _POLL_SECONDS):
                wake.clear()
                pauses = deque(_AFTER_WAKE_SECONDS)
    finally:
        stop_listening()
        await subscription.unsubscribe()


class _Seen:
    """Drops entries that were stored twice: a retry can come after the server's duplicate window."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}

    def new_entries(self, page: Sequence[Record], since: float | None) -> list[AuditEntry]:
        entries: list[AuditEntry] = []
        for record in page:
            try:
                entry = _decode(record.data)
            except msgspec.MsgspecError:
                log.warning("audit stream: message %d is no entry; passed over", record.revision)
                continue
            if entry.id not in self._ids and (since is None or entry.time >= since):
                entries.append(entry)
            self._ids[entry.id] = None
        while len(self._ids) > _REMEMBERED:
            del self._ids[next(iter(self._ids))]
        return entries


async def _bounds(bus: Bus, names: Names) -> tuple[int, int]:
    """The first and the last sequence of the audit stream."""
    state = (await bus.api(f"STREAM.INFO.{names.audit_stream}", {}))["state"]
    return int(state["first_seq"]), int(state["last_seq"])


async def _was_made_anew(bus: Bus, names: Names, start: int) -> bool:
    """Whether the stream ends before what was read of it already."""
    return start > 1 and (await _bounds(bus, names))[1] + 1 < start


# --- small things


def _heed_cancellation() -> None:
    """nats-py swallows a cancellation that meets it while it flushes; a loop must not go on then."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _is_entry(line: bytes) -> bool:
    try:
        entry = _decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return is_dns_label(entry.category) and is_dns_label(entry.action) and entry.id.isprintable()


def _weight(line: bytes) -> int:
    """For how many entries this one stands: more than one if it says that others were lost."""
    if ENTRIES_LOST.encode() not in line or not _is_entry(line):
        return 1
    lost = _decode(line).details.get("lost", "")
    return int(lost) if lost.isdigit() else 1


def _text(value: object, length: int) -> str:
    """As a string that JSON can hold. Secrets hide themselves in str()."""
    text = str(value).encode(errors="backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 1]}…"
