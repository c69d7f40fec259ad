"""The object store of an app: byte streams under a name, in the layout of NATS ADR-20.

An object is a number of chunk messages on a subject of its own and one entry message that says which they
are. The entry is written last and replaces the one before: half an object is never seen. `nats object` and
every NATS client can read what is written here, and the other way round.

Objects are read by direct get, so no consumer is needed, and memory stays flat both ways.

The entry is stored only if the chunks are all there at that very moment: the server compares with the last
one's sequence. So whoever removes left-overs meanwhile, rightly or not, fails the put, and damages nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from phalanx import system
from phalanx.data.gone import telling
from phalanx.errors import BusError, BusTimeout, BusUnavailable, DatabaseError, WrongRevision
from phalanx.names import Names
from phalanx.ports import Bus, Fence, Record

log = logging.getLogger("phalanx.objects")
T = TypeVar("T")

CHUNK_BYTES = 256 << 10
WINDOW = 16
"""Chunks that are sent before the first of them is acknowledged."""

PAGE_BYTES = 4 << 20
"""How much is read at once; the next page is fetched while this one is used."""

CHUNK_SECONDS = 15.0
"""For one chunk or page: a stream with replicas may have to elect a leader first."""

ENTRY_SECONDS = 15.0
SETTLE_SECONDS = 2.0
"""How long a put that has failed waits for the chunks that are under way, before it removes them."""

LAGGING_SECONDS = 45.0
"""How long chunks that the entry names may fail to come: the replica that answers can be a little behind,
the link slow."""

ORPHAN_SECONDS = 3600.0
_DIGEST = "SHA-256="


class ObjectInfo(msgspec.Struct, frozen=True):
    """What an object is. ``time``: when it was finished, Unix seconds; ``digest`` as in ADR-20."""

    name: str
    size: int = 0
    digest: str = ""
    chunks: int = 0
    nuid: str = ""
    metadata: Mapping[str, str] = {}
    time: float = 0.0


class _Options(msgspec.Struct, omit_defaults=True):
    max_chunk_size: int = 0


class _Entry(msgspec.Struct, omit_defaults=True):
    """The JSON of an entry message (ADR-20: ObjectInfo). Some clients need size and chunks, be they 0."""

    name: str
    bucket: str = ""
    nuid: str = ""
    size: int | None = None
    chunks: int | None = None
    mtime: str = ""
    digest: str = ""
    deleted: bool = False
    metadata: dict[str, str] | None = None
    options: _Options | None = None


_decode_entry = msgspec.json.Decoder(_Entry).decode
_encode = msgspec.json.Encoder().encode


class ObjectStore:
    """The objects of one app. Its stream exists already (``bus.provision.objects_config``).

    Beside what is said at each method, BusError means that NATS could not be reached: try again later
    (StreamGone: that there is no such store any more).
    """

    def __init__(self, bus: Bus, names: Names, app: str) -> None:
        self._bus, self._app = bus, app
        self._bucket = names.snapshots_bucket(app)
        self._stream = names.object_stream(self._bucket)
        self._names = names

    # --- writing

    async def put(
        self, name: str, chunks: AsyncIterable[bytes], metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        """Store what *chunks* yields (pieces of any size) under *name*, instead of what was there.

        All or nothing: until this returns, readers see the object that was there before. Raises
        DatabaseError when chunks were stored in a wrong order, BusError when some were removed meanwhile,
        and whatever *chunks* raises.
        """
        async with telling(self._bus, self._stream):
            return await self._put(name, chunks, metadata)

    async def _put(
        self, name: str, chunks: AsyncIterable[bytes], metadata: Mapping[str, str] | None
    ) -> ObjectInfo:
        before = await self.info(name)
        nuid = secrets.token_hex(11)
        try:
            size, count, digest, last = await self._send(self._chunks(nuid), chunks)
            await self._check_stored(name, nuid, count)
        except BaseException:
            await self._purge_quietly(nuid)
            raise
        entry = _Entry(
            name,
            self._bucket,
            nuid,
            size,
            count,
            datetime.now(UTC).isoformat(),
            _DIGEST + base64.urlsafe_b64encode(digest).decode(),
            metadata=dict(metadata) if metadata else None,
            options=_Options(self._chunk_bytes),
        )
        # No chunk is stored under that subject any more, so the last one stands for all of them.
        try:
            await self._write_entry(entry, Fence(self._chunks(nuid), last) if count else None)
        except WrongRevision:
            await self._purge_quietly(nuid)
            raise self._chunks_lost(name, count, 0) from None
        if before is not None:
            await self._purge_quietly(before.nuid)
        return _info(entry, system.wall())

    async def _send(self, subject: str, chunks: AsyncIterable[bytes]) -> tuple[int, int, bytes, int]:
        """Store *chunks*, some of them under way at once; size, number, SHA-256 and the last sequence.

        One connection and one server's queue keep their order; that it was kept is checked.
        """
        digest, size, count, last = hashlib.sha256(), 0, 0, 0
        window: deque[asyncio.Task[int]] = deque()

        async def acknowledged() -> None:
            nonlocal last
            sequence = await window[0]
            window.popleft()
            if sequence <= last:
                raise DatabaseError(f"object store of app {self._app!r}: chunks came out of order")
            last = sequence

        try:
            async for chunk in _resized(chunks, self._chunk_bytes):
                digest.update(chunk)
                size, count = size + len(chunk), count + 1
                writing = self._bus.write(subject, chunk, timeout=CHUNK_SECONDS)
                window.append(asyncio.create_task(writing, name=f"chunk {subject}"))
                if len(window) >= WINDOW:
                    await acknowledged()
            while window:
                await acknowledged()
        finally:
            if window:
                # What is under way has to be stored, or lost, before it can be removed.
                await asyncio.wait(window, timeout=SETTLE_SECONDS)
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)
        return size, count, digest.digest(), last

    async def _check_stored(self, name: str, nuid: str, count: int) -> None:
        """Whether the stream's leader holds so many chunks. Raises BusError."""
        subject = self._chunks(nuid)
        _, subjects = await _answered(lambda: self._subjects(subject))
        if (stored := subjects.get(subject, 0)) != count:
            raise self._chunks_lost(name, count, stored)

    def _chunks_lost(self, name: str, count: int, stored: int) -> BusError:
        problem = f"{stored} of {count} chunks were there when it should have been finished"
        return BusError(f"store object {name!r} of app {self._app!r}", problem)

    async def _write_entry(self, entry: _Entry, fence: Fence | None = None) -> None:
        """The same entry may be stored twice: it is tried until an answer comes.

        *fence*: what has to be so; raises WrongRevision. When no answer comes at all, the chunks stay where
        they are: an entry may yet turn up for them.
        """
        subject, data = self._names.object_entry(self._bucket, entry.name), _encode(entry)
        await _answered(lambda: self._bus.write(subject, data, fence=fence, headers={"Nats-Rollup": "sub"}))

    async def delete(self, name: str) -> bool:
        """Remove an object; whether there was one."""
        found = await self.info(name)
        if found is None:
            return False
        gone = _Entry(name, self._bucket, found.nuid, 0, 0, datetime.now(UTC).isoformat(), deleted=True)
        await self._write_entry(gone)
        await self._purge(found.nuid)
        return True

    async def sweep(self, older_than_seconds: float = ORPHAN_SECONDS) -> int:
        """Remove chunks that belong to no object and are that old: what interrupted writers left.

        By the clock of the server that answers, which has nothing to do with this host's. Returns of how many
        objects. A put that takes longer than that between two chunks fails, see :meth:`put`.
        """
        now, subjects = await self._subjects(self._chunks("*"))
        # Read after the chunks: what was finished in between is among these.
        known = {info.nuid for info in await self.list_objects()}
        swept = 0
        for nuid in {subject.rpartition(".")[2] for subject in subjects} - known:
            last = await self._bus.read(self._stream, self._chunks(nuid))
            if last is None or last.time >= now - older_than_seconds:
                continue
            # From here on its writer, should he still be there, cannot finish it.
            await self._bus.write(self._chunks(nuid), b"")
            if nuid in await self._finished():
                continue
            log.info("object store %s: removing chunks of an unfinished object", self._bucket)
            await self._purge(nuid)
            swept += 1
        return swept

    async def _finished(self) -> set[str]:
        """The ids of all objects, by the stream's leader: no replica that may be behind is asked."""
        _, subjects = await self._subjects(self._names.object_entries(self._bucket))
        records = [await self._bus.read(self._stream, subject) for subject in subjects]
        return {info.nuid for record in records if record is not None and (info := self._parse(record))}

    async def _subjects(self, pattern: str) -> tuple[float, dict[str, int]]:
        """The leader's time (Unix seconds), and how many messages each subject holds."""
        info = await self._bus.api(f"STREAM.INFO.{self._stream}", {"subjects_filter": pattern})
        # Nanoseconds: fromisoformat takes what is more than microseconds, and leaves it out.
        now = datetime.fromisoformat(info["ts"]).timestamp()
        return now, info["state"].get("subjects") or {}

    async def now(self) -> float:
        """What time it is for NATS, which stamps the objects: Unix seconds. Raises BusError."""
        return (await self._subjects(self._chunks("none")))[0]

    async def _purge_quietly(self, nuid: str) -> None:
        try:
            await self._purge(nuid)
        except BusError as error:
            log.warning("object store %s: leftovers of %s are not removed yet: %s", self._bucket, nuid, error)

    async def _purge(self, nuid: str) -> None:
        await self._bus.api(f"STREAM.PURGE.{self._stream}", {"filter": self._chunks(nuid)})

    # --- reading

    async def info(self, name: str) -> ObjectInfo | None:
        """What is there under *name*, by the stream's leader; None if nothing."""
        async with telling(self._bus, self._stream):
            record = await self._bus.read(self._stream, self._names.object_entry(self._bucket, name))
        return None if record is None else self._parse(record)

    async def list_objects(self) -> list[ObjectInfo]:
        """All objects, oldest first. A moment behind: any replica may answer."""
        async with telling(self._bus, self._stream):
            records = await self._bus.snapshot(self._stream, self._names.object_entries(self._bucket))
        return [info for record in records if (info := self._parse(record)) is not None]

    def get(self, name: str, *, page_bytes: int = PAGE_BYTES) -> AsyncGenerator[bytes]:
        """The content of *name*, chunk by chunk; about two pages are in memory at any time.

        Only when it has ended without an error is the content known to be right. Raises DatabaseError when
        there is none, when it was replaced meanwhile, and when size or SHA-256 are not what was written.
        Close it (``contextlib.aclosing``) where you do not read to the end.
        """
        return self._get(name, page_bytes)

    async def _get(self, name: str, page_bytes: int) -> AsyncGenerator[bytes]:
        info = await self.info(name)
        if info is None:
            raise DatabaseError(f"object {name!r} of app {self._app!r} does not exist")
        digest, size = hashlib.sha256(), 0
        async with contextlib.aclosing(self._pages(info, page_bytes)) as pages:
            async for page in pages:
                for chunk in page:
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk
        found = _DIGEST + base64.urlsafe_b64encode(digest.digest()).decode()
        if size != info.size or found.rstrip("=") != info.digest.rstrip("="):
            raise DatabaseError(
                f"object {name!r} of app {self._app!r} is damaged: {size} bytes with {found}, "
                f"not {info.size} bytes with {info.digest}"
            )

    async def _pages(self, info: ObjectInfo, page_bytes: int) -> AsyncGenerator[list[bytes]]:
        """All chunks of *info*, in pages; each is fetched while the one before it is used."""
        left, start = info.chunks, 1
        fetching: asyncio.Task[list[Record]] | None = None
        try:
            while left:
                if fetching is None:
                    fetching = self._fetch(info, start, left, page_bytes)
                page, fetching = await fetching, None
                left -= len(page)
                start = page[-1].revision + 1
                if left:
                    fetching = self._fetch(info, start, left, page_bytes)
                yield [record.data for record in page]
        finally:
            if fetching is not None:
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)

    def _fetch(self, info: ObjectInfo, start: int, left: int, page_bytes: int) -> asyncio.Task[list[Record]]:
        return asyncio.create_task(
            self._read_page(info, start, left, page_bytes), name=f"page of {info.name}"
        )

    async def _read_page(self, info: ObjectInfo, start: int, left: int, page_bytes: int) -> list[Record]:
        """The next chunks, at least one and at most *left*. Waits for a replica that lags behind."""
        deadline = system.now() + LAGGING_SECONDS
        while True:
            try:
                page = await self._bus.read_log(
                    self._stream,
                    self._chunks(info.nuid),
                    start=start,
                    limit=min(left, 1024),
                    max_bytes=page_bytes,
                    timeout=CHUNK_SECONDS,
                )
                if page:
                    return page
                now = await self.info(info.name)
                if now is None or now.nuid != info.nuid:
                    raise DatabaseError(
                        f"object {info.name!r} of app {self._app!r} was replaced or deleted meanwhile"
                    )
            except (BusTimeout, BusUnavailable) as error:
                if system.now() >= deadline:
                    raise
                if isinstance(error, BusTimeout):
                    page_bytes = max(1, page_bytes // 4)  # a slow link
            if system.now() >= deadline:
                raise DatabaseError(
                    f"object {info.name!r} of app {self._app!r}: {left} of {info.chunks} chunks are missing"
                )
            await asyncio.sleep(0.05)

    # --- small things

    @property
    def _chunk_bytes(self) -> int:
        return min(CHUNK_BYTES, self._bus.max_payload)

    def _chunks(self, nuid: str) -> str:
        return self._names.object_chunks(self._bucket, nuid)

    def _parse(self, record: Record) -> ObjectInfo | None:
        try:
            entry = _decode_entry(record.data)
        except ValueError as error:
            raise DatabaseError(f"object store {self._bucket}: entry {record.subject}: {error}") from None
        return None if entry.deleted else _info(entry, record.time)


async def _answered(call: Callable[[], Awaitable[T]]) -> T:
    """Call until an answer comes, for ENTRY_SECONDS at most."""
    deadline = system.now() + ENTRY_SECONDS
    while True:
        try:
            return await call()
        except (BusTimeout, BusUnavailable):
            if system.now() >= deadline:
                raise
        await asyncio.sleep(0.1)


def _info(entry: _Entry, time: float) -> ObjectInfo:
    metadata = entry.metadata or {}
    size, chunks = entry.size or 0, entry.chunks or 0
    return ObjectInfo(entry.name, size, entry.digest, chunks, entry.nuid, metadata, time)


async def _resized(pieces: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of *size*, but for the last one."""
    rest = bytearray()
    async for piece in pieces:
        if len(piece) == size and not rest:
            yield piece
            continue
        rest += piece
        at = 0
        while len(rest) - at >= size:
            yield bytes(rest[at : at + size])
            at += size
        del rest[:at]
    if rest:
        yield bytes(rest)
