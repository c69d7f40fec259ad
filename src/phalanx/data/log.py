"""The WAL log of an app: one JetStream stream, whose sequence numbers are the positions of all replicas.

Every message is published with the last sequence that its writer expects, so the server itself keeps the
order and keeps a deposed leader out (G2):

* A new leader reads the end of the log: its last sequence L and that entry's epoch, in *one* answer. Is that
  epoch higher than its own, it is deposed. Else it publishes its seal, expecting L.
* If the seal is stored, then nothing was stored since that look; so no seal of a newer epoch lies before it,
  however long the leader slept in between. Else it looks again.
* An old leader that appends as fast as it can would win that race for ever. Then the new one first writes a
  *claim*, which expects only that no seal came since its look. It takes up a sequence, so the old leader's
  next append is refused, and means nothing else.
* A leader appends expecting the sequence of its own last entry, and never takes over another one. As soon as
  another leader has sealed, no append of it can be stored any more.

A refusal or a timeout proves nothing about who wrote: the writer reads back and looks for its nonce. So it
need not be patient (``data.patience``): it looks soon, and sends again what is not there. Should the first
one arrive after all, one of the two is refused, since both expect the same sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from phalanx import system
from phalanx.data.entries import (
    Claim,
    Draft,
    Foreign,
    LogEntry,
    LogRecord,
    ObjectPointer,
    Seal,
    SealKind,
    parse,
    seal_body,
    seal_headers,
)
from phalanx.data.gone import check_there, may_be_gone
from phalanx.data.objects import ObjectStore
from phalanx.data.patience import Patience, longest_seconds
from phalanx.errors import BusError, BusTimeout, BusUnavailable, DatabaseError, Fenced, WrongRevision
from phalanx.names import Names
from phalanx.ports import STREAM_NOT_FOUND, Bus, Fence, Record

log = logging.getLogger("phalanx.log")

T = TypeVar("T")
E = TypeVar("E", Seal, LogRecord)

EXPECTED = "Nats-Expected-Last-Sequence"
HEADER_BYTES = 4096
"""Left for headers, ours and those that the server adds, in each message."""

REFUSALS = 3
"""After so many refusals in a row a seal is preceded by a claim."""

RETRY_SECONDS = (0.02, 0.5)
LOOK_SECONDS = 1.0
"""The longest deadline of a look. While a new leader is elected nobody answers: what was asked then is lost,
and the sooner it is asked again, the sooner it is known that there is one."""

DOUBT_SECONDS = 2.0
"""When nobody has answered for so long, it is looked whether the stream is there at all."""

BEHIND_SECONDS = (0.02, 0.2)
"""Between looks at a leader whose log is shorter than it was: a new one may be about to catch up."""

PAGE_BYTES = 4 << 20
DECIDE_SECONDS = 10.0
"""How long an old leader of the stream may go on answering from its own, shorter copy (raft's lost-quorum
limit): only when the end of the log is behind what was seen for that long, writes are really lost."""

NO_LEADER = (10008, 10009)
"""JSClusterNotAvailErr, JSClusterNotLeaderErr: an election is under way."""

_FILE_CHUNK = 1 << 18


LOST_WRITES = "NATS has lost acknowledged writes"
"""In every message that says so."""


class LogWentBack(DatabaseError):
    """The log ends before what it is known to have held: NATS has lost writes that it had acknowledged."""

    def __init__(self, app: str, seen: int, last: int) -> None:
        self.app, self.seen, self.last = app, seen, last
        super().__init__(
            f"app {app!r}: the WAL log ends at {last}, but held {seen}: {LOST_WRITES}",
            "servers that lost power may do so: set jetstream sync_interval: always",
        )


class LogEnd(msgspec.Struct, frozen=True):
    """The end of the log. ``sequence``: the last one ever used; ``epoch`` and ``txid``: as of there.

    ``entry`` is None where the log holds nothing (any more). ``last_seal`` and ``last_record`` are filled
    in by :meth:`WalLog.last`.
    """

    sequence: int = 0
    epoch: int = 0
    txid: int = 0
    entry: LogEntry | None = None
    last_seal: Seal | None = None
    last_record: LogRecord | None = None


class LogState(msgspec.Struct, frozen=True):
    """What the stream holds. Where it is empty, ``first`` is ``last`` + 1."""

    first: int
    last: int
    bytes: int
    messages: int
    replicas: int = 1


class WalLog:
    """The log of one app. Its stream and its object store exist already (``bus.provision``).

    Beside what is said at each method, BusError means that NATS could not be reached in time, StreamGone that
    the log is there no more, and LogWentBack that NATS has lost a part of it.
    """

    def __init__(self, bus: Bus, names: Names, app: str, objects: ObjectStore | None = None) -> None:
        self.bus = self._bus = bus
        self._app = app
        self.stream = self._stream = names.wal_stream(app)
        self._subjects = names.wal_subjects(app)
        self._records, self._seals = names.wal_record_subject(app), names.wal_seal_subject(app)
        self._claims = names.wal_claim_subject(app)
        self.objects = objects if objects is not None else ObjectStore(bus, names, app)
        self._seen = 0
        self._patience = Patience()
        self._unsure = ""
        """The nonce of a draft of which it is not known whether it was stored."""

    @property
    def max_inline_bytes(self) -> int:
        """The largest LTX file that goes into the log itself."""
        return self._bus.max_payload - HEADER_BYTES

    @property
    def seen(self) -> int:
        """The highest sequence that this log is known to have had."""
        return self._seen

    def saw(self, sequence: int) -> None:
        """The log is known to have had *sequence*, for example since a replica is there."""
        self._seen = max(self._seen, sequence)

    def accept_loss(self) -> None:
        """Take the log for what it is now: only once LogWentBack was reported, and nothing here is as of
        before any more, neither replica nor live database."""
        self._seen = 0

    # --- the end of the log

    async def last(self, *, timeout: float = 10.0) -> LogEnd:
        """The end of the log as the stream's leader has it, with the last seal and the last record.

        Both are those up to ``sequence``; None where they are gone.
        """
        return await self._until(timeout, self._last)

    async def _last(self, patience: float) -> LogEnd | None:
        end = await self._tip(patience)
        seal = await self._last_of(end, self._seals, Seal, patience)
        record = await self._last_of(end, self._records, LogRecord, patience)
        if any(entry is not None and entry.sequence > end.sequence for entry in (seal, record)):
            return None  # somebody wrote between the looks
        return LogEnd(end.sequence, end.epoch, end.txid, end.entry, seal, record)

    async def _last_of(self, end: LogEnd, subject: str, kind: type[E], patience: float) -> E | None:
        if isinstance(end.entry, kind):
            return end.entry
        found = await self._read(subject, patience)
        entry = parse(found) if found is not None else None
        if isinstance(entry, Foreign):
            entry = await self._newest(end.sequence, kind)
        return entry if isinstance(entry, kind) else None

    async def _tip(self, patience: float) -> LogEnd:
        """The last sequence, with its entry's epoch and txid. Raises LogWentBack, once that is certain.

        *patience*: for each answer, in seconds.
        """
        deadline = system.now() + DECIDE_SECONDS
        delay, longest = BEHIND_SECONDS
        while (end := await self._look(patience)).sequence < self._seen:
            if system.now() >= deadline:
                raise LogWentBack(self._app, self._seen, end.sequence)
            await asyncio.sleep(delay)
            delay = min(longest, 2 * delay)
        self.saw(end.sequence)
        return end

    async def _look(self, patience: float) -> LogEnd:
        record = await self._read(self._subjects, patience)
        if record is None:
            return LogEnd((await self.state()).last)
        entry = parse(record)
        if isinstance(entry, Seal | LogRecord):
            return LogEnd(entry.sequence, entry.epoch, entry.txid, entry)
        # A claim, or somebody else's message: what holds is the last one that is neither.
        ours = await self._newest(entry.sequence, Seal | LogRecord)
        epoch, txid = (ours.epoch, ours.txid) if isinstance(ours, Seal | LogRecord) else (0, 0)
        return LogEnd(entry.sequence, epoch, txid, entry)

    async def _read(self, subject: str, patience: float) -> Record | None:
        return await self._bus.read(self._stream, subject, timeout=min(patience, LOOK_SECONDS))

    async def _newest(self, up_to: int, kind: Any) -> LogEntry | None:
        """The last entry of that kind, where foreign ones hide it from a look by subject."""
        width, found = 64, None
        while found is None:
            at = start = max(1, up_to - width + 1)
            while at <= up_to:
                page = await self.read(at)
                if not page:
                    raise BusTimeout(f"WAL log of {self._app}", "the replica that answers is behind")
                found = next((e for e in reversed(page) if isinstance(e, kind)), found)
                at = page[-1].sequence + 1
            if start == 1:
                break
            width *= 8
        return found

    # --- writing

    async def seal(
        self,
        epoch: int,
        node: str,
        kind: SealKind,
        reason: str = "",
        *,
        timeout: float = 10.0,
    ) -> Seal:
        """Append a seal; from then on no leader of an older epoch can append anything.

        ``Seal.txid`` is the last transaction in the log before it. Raises Fenced when a newer epoch has
        sealed.
        """
        nonce = secrets.token_hex(8)
        refusals = 0

        async def attempt(patience: float) -> Seal | None:
            nonlocal refusals
            while True:
                end = await self._tip(patience)
                if end.epoch > epoch:
                    raise Fenced(self._app, epoch)
                if isinstance(end.entry, Seal) and end.entry.nonce == nonce:
                    return end.entry
                seal = Seal(end.sequence + 1, epoch, node, end.txid, kind, reason, nonce)
                body, headers = seal_body(epoch, node, end.txid, kind, reason), seal_headers(epoch, nonce)
                try:
                    await self._write(self._seals, body, headers, end.sequence, patience)
                except WrongRevision:
                    # Somebody appended, or it is ours from an attempt before: look again, at once.
                    refusals += 1
                    if refusals % REFUSALS == 0:
                        await self._claim(epoch, patience)
                        return None
                    continue
                self.saw(seal.sequence)
                return seal

        return await self._until(timeout, attempt)

    async def _claim(self, epoch: int, patience: float) -> None:
        """Stop the appends of older leaders; of a newer one that has sealed they can't be stopped so."""
        found = await self._read(self._seals, patience)
        last = parse(found) if found is not None else None
        if isinstance(last, Seal) and last.epoch > epoch:
            raise Fenced(self._app, epoch)
        fence = Fence(self._seals, found.revision if found is not None else 0)
        headers = seal_headers(epoch, secrets.token_hex(8))
        with contextlib.suppress(WrongRevision):
            await self._bus.write(self._claims, b"", fence=fence, headers=headers, timeout=patience)

    async def append(self, expected_sequence: int, draft: Draft, *, timeout: float = 10.0) -> int:
        """Append a record right after *expected_sequence*, this writer's last entry; its sequence.

        After a BusError it is unknown whether it was stored: append the same draft at the same place again.
        Raises Fenced when a newer epoch has sealed, DatabaseError when something else is at that place,
        OSError when the file cannot be read.
        """
        deadline = system.now() + timeout
        self.saw(expected_sequence)
        pointer, body = None, b""
        if draft.size > self.max_inline_bytes:
            pointer = await self._put(expected_sequence, draft)
        else:
            body = draft.content if isinstance(draft.content, bytes) else draft.content.read_bytes()
        headers = draft.headers(pointer)
        began, sent = system.now(), 0

        async def found(patience: float) -> int | None:
            if (sequence := await self._stored(expected_sequence, draft, patience)) is not None:
                self._patience.took(system.now() - began, len(body))
            return sequence

        async def attempt(patience: float) -> int | None:
            nonlocal sent
            # Never sent twice without a look between, which waits for what is still on its way.
            if self._unsure == draft.nonce and (sequence := await found(patience)) is not None:
                return sequence
            self._unsure = draft.nonce
            sent += 1
            try:
                sequence = await self._write(self._records, body, headers, expected_sequence, patience)
            except WrongRevision:
                return await found(patience)
            self.saw(sequence)
            if sent == 1:  # else the first one was lost, and tells nothing about the server
                self._patience.took(system.now() - began, len(body))
            return sequence

        return await self._until(max(longest_seconds(len(body)), deadline - system.now()), attempt, len(body))

    async def _stored(self, expected: int, draft: Draft, patience: float) -> int | None:
        """Whether *draft* is in the log: its sequence. None: not so far, and its place is free."""
        end = await self._tip(patience)
        claimed = end.entry.epoch if isinstance(end.entry, Claim) else 0
        if max(end.epoch, claimed) > draft.epoch:
            raise Fenced(self._app, draft.epoch)
        if end.sequence == expected:
            return None
        if end.sequence == expected + 1 and end.entry is not None and end.entry.nonce == draft.nonce:
            return end.sequence
        raise DatabaseError(
            f"app {self._app!r}: the WAL log holds something unexpected after {expected} "
            f"(it ends at {end.sequence}, epoch {end.epoch})",
            "nothing but Phalanx may write there: see phalanx nats permissions",
        )

    async def _write(
        self, subject: str, data: bytes, headers: dict[str, str], expected: int, patience: float
    ) -> int:
        return await self._bus.write(
            subject, data, headers={**headers, EXPECTED: str(expected)}, timeout=patience
        )

    async def _put(self, expected: int, draft: Draft) -> ObjectPointer:
        """*draft*'s content as an object. Its name begins with the sequence, so that a purge finds it."""
        name = f"{_object_prefix(expected + 1)}-{draft.epoch}-{draft.nonce}"
        info = await self.objects.info(name)
        if info is None:
            info = await self.objects.put(name, _content(draft), {"txid": str(draft.txid)})
        if info.size != draft.size:
            raise DatabaseError(
                f"app {self._app!r}: transaction {draft.txid} had {info.size} bytes, not {draft.size}"
            )
        return ObjectPointer(name, info.size, info.digest)

    async def _until(
        self, timeout: float, attempt: Callable[[float], Coroutine[Any, Any, T | None]], size_bytes: int = 0
    ) -> T:
        """Repeat *attempt* until it gives something, for *timeout* seconds, while NATS does not answer.

        It is told how long it may wait for each answer, where a message of *size_bytes* is sent.
        """
        deadline = system.now() + timeout
        delay, longest = RETRY_SECONDS
        doubtful_at = system.now() + DOUBT_SECONDS
        failure: BusError | None = None
        passed = 0
        while True:
            try:
                if (result := await attempt(self._patience.seconds(passed, size_bytes))) is not None:
                    return result
            except BusError as error:
                if error.code == STREAM_NOT_FOUND:
                    doubtful_at = 0.0
                elif not isinstance(error, BusUnavailable | BusTimeout) and error.code not in NO_LEADER:
                    raise
                failure = error
                if system.now() >= doubtful_at and may_be_gone(self._bus, error):
                    await check_there(self._bus, self._stream)
                    doubtful_at = system.now() + DOUBT_SECONDS
                if isinstance(error, BusTimeout):
                    passed, delay = passed + 1, RETRY_SECONDS[0]  # it was waited for already
            if system.now() + delay >= deadline:
                raise failure or BusTimeout(f"WAL log of {self._app}", f"not settled within {timeout:g} s")
            await asyncio.sleep(delay)
            delay = min(longest, 2 * delay)

    # --- reading

    async def read(
        self, start: int, *, limit: int = 256, max_bytes: int = PAGE_BYTES, timeout: float = 5.0
    ) -> list[LogEntry]:
        """Entries from *start* on, in order, about *max_bytes* of them. Any replica may answer: it can be a
        moment behind. The first one has a higher sequence than *start* where that was purged."""
        records = await self._bus.read_log(
            self._stream, self._subjects, start=start, limit=limit, max_bytes=max_bytes, timeout=timeout
        )
        if records:
            self.saw(records[-1].revision)
        return [parse(record) for record in records]

    async def oldest(self, *, timeout: float = 10.0) -> LogEntry | None:
        """The first entry that the log still holds, None if it holds nothing."""
        entries: list[LogEntry] = []

        async def attempt(_: float) -> bool | None:
            state = await self.state()
            entries[:] = await self.read(state.first, limit=1) if state.messages else []
            return True if entries or not state.messages else None  # a replica may lag behind the leader

        await self._until(timeout, attempt)
        return entries[0] if entries else None

    async def seals(self, after: int, *, timeout: float = 10.0) -> list[Seal]:
        """All seals after the sequence *after* that the log still holds, in order; none is overlooked."""
        newest = await self._bus.read(self._stream, self._seals)
        found: list[Seal] = []
        start = after + 1

        async def attempt(_: float) -> list[Seal] | None:
            nonlocal start
            if newest is None or newest.revision < start:
                return found
            page = await self._bus.read_log(self._stream, self._seals, start=start, max_bytes=PAGE_BYTES)
            found.extend(entry for record in page if isinstance(entry := parse(record), Seal))
            start = page[-1].revision + 1 if page else start
            return found if start > newest.revision else None  # a replica may lag behind the leader

        return await self._until(timeout, attempt)

    async def download(self, record: LogRecord, target: Path) -> None:
        """The content of a record with a pointer, into a file. Raises DatabaseError, BusError, OSError."""
        pointer = record.pointer
        if pointer is None:
            raise ValueError(f"record {record.sequence} is in the log itself")
        info = await self.objects.info(pointer.name)
        if info is None or info.digest != pointer.digest:
            raise DatabaseError(f"app {self._app!r}: the object of record {record.sequence} is gone")
        file = await asyncio.to_thread(open, target, "wb")
        try:
            async with contextlib.aclosing(self.objects.get(pointer.name)) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
        finally:
            await asyncio.to_thread(file.close)

    async def state(self) -> LogState:
        """First and last sequence and size, by the stream's leader."""
        info = await self._bus.api(f"STREAM.INFO.{self._stream}", {})
        state = info["state"]
        replicas = info["config"].get("num_replicas", 1)
        return LogState(state["first_seq"], state["last_seq"], state["bytes"], state["messages"], replicas)

    async def record_at_time(self, time: float) -> int:
        """The sequence of the last entry that was stored up to *time* (Unix seconds); 0 if that is before
        all that the log still holds."""
        later = await self._bus.read_log(
            self._stream, self._subjects, start_time=time + 1e-6, limit=1, max_bytes=1
        )
        state = await self.state()
        sequence = later[0].revision - 1 if later else state.last
        return sequence if sequence >= state.first else 0

    # --- cleaning up

    async def purge(self, up_to_sequence: int) -> int:
        """Remove the entries up to and with *up_to_sequence*, but never the last record and what follows:
        it tells epoch and transaction.

        Their objects go with them. Returns how many entries were removed.
        """
        end = await self.last()
        last = end.last_record or end.last_seal
        keep = min(up_to_sequence + 1, last.sequence if last is not None else 1)
        if keep <= 1:
            return 0
        answer = await self._bus.api(f"STREAM.PURGE.{self._stream}", {"seq": keep})
        for info in await self.objects.list_objects():
            if info.name.startswith(_OBJECTS) and info.name < _object_prefix(keep):
                await self.objects.delete(info.name)
        return int(answer.get("purged", 0))


_OBJECTS = "wal/"


def _object_prefix(sequence: int) -> str:
    return f"{_OBJECTS}{sequence:020d}"


async def _content(draft: Draft) -> AsyncIterator[bytes]:
    if isinstance(draft.content, bytes):
        yield draft.content
        return
    with await asyncio.to_thread(open, draft.content, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, _FILE_CHUNK):
            yield chunk
