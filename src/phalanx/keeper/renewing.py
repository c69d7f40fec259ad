"""Renewing a session: drives :class:`phalanx.decide.session.Holder` over a bus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.decide.session import Holder, Renewal, SessionBody, StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, WrongRevision
from phalanx.names import Names
from phalanx.ports import Bus, Connection
from phalanx.types import SessionId

log = logging.getLogger("phalanx.keeper")

TOMBSTONE_KEPT_SECONDS = 3600.0
"""How long a tombstone stays: much longer than any TTL (at most 300 s)."""

_decode_body = msgspec.json.Decoder(SessionBody).decode
_encode_body = msgspec.json.Encoder().encode


class Renewer:
    """Keeps one session alive. The owner calls :meth:`tick`, and waits on :attr:`progress` between."""

    def __init__(
        self,
        bus: Bus,
        names: Names,
        session: SessionId,
        streams: StreamList,
        timing: Timing,
        on_progress: Callable[[], None],
    ) -> None:
        self._bus, self._names, self._timing = bus, names, timing
        self._on_progress = on_progress
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.holder = Holder(session, streams, timing)
        self.renewals = 0
        self.connected_at = float("-inf")
        """When the last reconnection came about."""
        self._end_connection_watch = bus.on_connection(self._on_connection)

    @property
    def bus(self) -> Bus:
        """What it renews over."""
        return self._bus

    @property
    def is_connected(self) -> bool:
        """Whether renewals can be sent now."""
        return self._bus.is_connected

    async def switch_server(self, why: str) -> None:
        """Renew through another NATS server."""
        await self._bus.switch_server(why)

    @property
    def _timeout(self) -> float:
        return max(0.2, min(1.0, self._timing.ttl / 5))

    def tick(self) -> None:
        """Send what is due. One request per stream is under way at a time."""
        if not self._bus.is_connected:
            return
        for renewal in self.holder.renewals(system.now()):
            self._start(renewal.stream, self._renew(renewal))
        for stream in self.holder.reads():
            if stream not in self._tasks:
                self._start(stream, self._read(stream))

    def _start(self, stream: str, work: asyncio._CoroutineLike[None]) -> None:  # pyright: ignore[reportPrivateUsage]
        task = asyncio.create_task(work, name=f"keeper {stream}")
        self._tasks[stream] = task
        task.add_done_callback(lambda done: self._finished(stream, done))

    def _finished(self, stream: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(stream) is task:
            del self._tasks[stream]
        if task.cancelled():
            # Perhaps before its first step, so that it could not say so itself.
            self.holder.on_unanswered(stream)
        elif (error := task.exception()) is not None:
            log.error("renewal on %s failed unexpectedly", stream, exc_info=error)
            self.holder.on_unanswered(stream)
        self._on_progress()

    async def _renew(self, renewal: Renewal) -> None:
        subject = self._names.session_subject(renewal.stream, self.holder.session)
        body = _encode_body(SessionBody(generation=self.holder.streams.generation))
        sent_at = system.now()
        try:
            revision = await self._bus.write(subject, body, expect=renewal.revision, timeout=self._timeout)
        except WrongRevision:
            self.holder.on_refused(renewal.stream)
        except BusError as error:
            log.debug("renewal on %s: %s", renewal.stream, error)
            self.holder.on_unanswered(renewal.stream)
        except asyncio.CancelledError:
            self.holder.on_unanswered(renewal.stream)
            raise
        else:
            self.renewals += 1
            self.holder.on_ack(renewal.stream, sent_at, revision)

    async def _read(self, stream: str) -> None:
        subject = self._names.session_subject(stream, self.holder.session)
        try:
            record = await self._bus.read(stream, subject, timeout=self._timeout)
        except BusError as error:
            log.debug("read back on %s: %s", stream, error)
            return
        if record is None or record.removed:
            self.holder.on_read(stream, 0, None, system.now())
        else:
            self.holder.on_read(stream, record.revision, _decode_body(record.data), system.now())

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self.connected_at = system.now()
        # Requests on a connection that broke will not be answered: do not wait for their timeout.
        if event is Connection.DISCONNECTED:
            for task in self._tasks.values():
                task.cancel()
        self._on_progress()

    async def release(self, reason: str, by: str, deadline: float) -> bool:
        """End the session: write tombstones until a majority has them. False if *deadline* came first."""
        self._end_connection_watch()
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        body = _encode_body(SessionBody(self.holder.streams.generation, True, reason, by, True))
        done: set[str] = set()
        revisions = {name: self.holder.revisions().get(name, 0) for name in self.holder.streams.all_streams}
        while system.now() < deadline:
            missing = [name for name in revisions if name not in done]
            attempts = [asyncio.create_task(self._bury(n, revisions, body, done)) for n in missing]
            pending = set(attempts)
            while pending:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if self.holder.streams.has_majority(done):
                    # The others get theirs too if their server answers; nobody needs to wait for it.
                    await asyncio.wait(attempts, timeout=0.1)
                    for rest in attempts:
                        rest.cancel()
                    return True
            await asyncio.sleep(0.05)
        return False

    async def report_fenced(self, reason: str) -> None:
        """Write the audit entry that the killed node cannot write. Best effort: the log has it, too."""
        session = self.holder.session
        entry_id = f"{session}-fenced"
        entry = {
            "id": entry_id,
            "time": system.wall(),
            "node": session.node,
            "category": "node",
            "action": "fenced",
            "reason": reason,
            "details": {"session": str(session), "by": "keeper"},
        }
        try:
            await self._bus.write(
                self._names.audit_subject("node", "fenced"),
                _encode_body(entry),
                headers={"Nats-Msg-Id": entry_id},
                timeout=1.0,
            )
        except BusError as error:
            log.warning("the audit entry of this fencing is lost: %s", error)

    async def _bury(self, stream: str, revisions: dict[str, int], body: bytes, done: set[str]) -> None:
        subject = self._names.session_subject(stream, self.holder.session)
        try:
            await self._bus.write(
                subject,
                body,
                expect=revisions[stream],
                ttl_seconds=TOMBSTONE_KEPT_SECONDS,
                timeout=self._timeout,
            )
            done.add(stream)
        except WrongRevision:
            # A renewal whose reply was lost, or an observer was first: look.
            try:
                record = await self._bus.read(stream, subject, timeout=self._timeout)
            except BusError as error:
                log.debug("release on %s: %s", stream, error)
                return
            if record is not None and not record.removed and _decode_body(record.data).tombstone:
                done.add(stream)
            revisions[stream] = record.revision if record is not None else 0
        except BusError as error:
            log.debug("release on %s: %s", stream, error)
