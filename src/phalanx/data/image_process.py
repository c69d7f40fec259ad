"""The node's side of ``data.images``: its commands, each in a short-lived process, as streams with deadlines.

Whoever awaits one of these owns the process: a cancellation kills it and sees its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import msgspec

from phalanx import child
from phalanx.data.image_format import ImageHead, parse_head, parse_tail
from phalanx.data.images import RECORD, Applied
from phalanx.errors import DatabaseError

STALL_SECONDS = 300.0
"""Without any progress for so long it is given up. Syncing a large file to a slow disk takes its time."""

_PIECE_BYTES = 256 << 10
_LINE_BYTES = 4096
_TAIL_BYTES = 1024

T = TypeVar("T")
OnBytes = Callable[[int], None]
"""Told what has been done, in bytes of the database."""


def _ignore(_count: int) -> None:
    pass


class ImageSource(msgspec.Struct, frozen=True):
    """A database to take an image of. Either ``journal`` (a replica's) or ``capture`` (the folder with the
    level 0 files of a live database) says which position it has."""

    database: Path
    journal: Path | None = None
    capture: Path | None = None

    def arguments(self) -> tuple[str, ...]:
        """For the command line. Raises ValueError unless one of both is given."""
        if (self.journal is None) == (self.capture is None):
            raise ValueError("one of journal and capture")
        where = ("--journal", self.journal) if self.journal is not None else ("--capture", self.capture)
        return ("pack", str(self.database), where[0], str(where[1]))


class RecordSource(Protocol):
    """One LTX file on its way to :func:`apply`."""

    @property
    def txid(self) -> int: ...
    @property
    def size(self) -> int: ...
    def chunks(self) -> AsyncIterable[bytes]:
        """Its content."""
        ...


class _Process:
    """One run of ``phalanx.data.images``. Use it with ``async with``: nothing is left of it afterwards."""

    def __init__(self, arguments: Sequence[str], on_bytes: OnBytes) -> None:
        self._arguments, self._on_bytes = arguments, on_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._reading_errors: asyncio.Task[None] | None = None
        self._problem = ""

    async def __aenter__(self) -> _Process:
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "phalanx.data.images",
            *self._arguments,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=child.environment(),
            start_new_session=True,
            limit=4 * _PIECE_BYTES,
        )
        self._reading_errors = asyncio.create_task(self._read_errors(process), name="image process errors")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._running
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await child.finish(asyncio.ensure_future(self._see_end()))

    async def _see_end(self) -> None:
        process = self._running
        # Until all pipes are at their end: a transport that is not closed would be left.
        if process.stdout is not None:
            while await process.stdout.read(_PIECE_BYTES):
                pass
        await process.wait()
        if self._reading_errors is not None:
            await self._reading_errors

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def _read_errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        rest = b""
        while data := await process.stderr.read(_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:_LINE_BYTES]
            for line in lines:
                if line[:1] == b"@" and line[1:].isdigit():
                    self._on_bytes(int(line[1:]))
                elif line.strip():
                    self._problem = line.decode(errors="replace").strip()

    async def read(self) -> bytes:
        """A piece of its output, empty at the end. Raises DatabaseError when nothing comes."""
        assert self._running.stdout is not None
        try:
            async with asyncio.timeout(STALL_SECONDS):
                return await self._running.stdout.read(_PIECE_BYTES)
        except TimeoutError:
            raise DatabaseError(f"{self._name} has stalled for {STALL_SECONDS:g} s") from None

    async def write(self, data: bytes) -> bool:
        """Give it input, as fast as it takes it; False if it takes no more: :meth:`end` says why."""
        stdin = self._running.stdin
        assert stdin is not None
        try:
            async with asyncio.timeout(STALL_SECONDS):
                stdin.write(data)
                await stdin.drain()
        except TimeoutError:
            raise DatabaseError(f"{self._name} has stalled for {STALL_SECONDS:g} s") from None
        except (BrokenPipeError, ConnectionResetError):
            return False
        return not stdin.is_closing()

    def end_input(self) -> None:
        """There is no more input."""
        assert self._running.stdin is not None
        self._running.stdin.close()

    async def end(self) -> None:
        """Wait for its end. Raises DatabaseError with what went wrong."""
        code = await self._running.wait()
        if self._reading_errors is not None:
            await asyncio.wait({self._reading_errors})
        if code:
            raise DatabaseError(self._problem or f"{self._name} {child.how_ended(code)}")

    async def answer(self, of: type[T]) -> T:
        """Its one line of JSON, after its end."""
        data = b""
        while piece := await self.read():
            data += piece
        await self.end()
        return msgspec.json.decode(data, type=of)

    @property
    def _name(self) -> str:
        return f"{self._arguments[0]} of a database image"


class Packing:
    """An image that is being packed: its head, and all of its stream."""

    def __init__(self, process: _Process, head: ImageHead, begin: bytes) -> None:
        self.head = head
        self._process, self._begin = process, begin

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The stream from its beginning on. Complete when it ends without DatabaseError."""
        yield self._begin
        while piece := await self._process.read():
            yield piece
        await self._process.end()


@contextlib.asynccontextmanager
async def pack(source: ImageSource, on_bytes: OnBytes = _ignore) -> AsyncGenerator[Packing]:
    """Begin an image of *source*. Raises DatabaseError, OSError.

    The moment is chosen when this begins, and the WAL cannot be cut off until it has ended.
    """
    async with _Process(source.arguments(), on_bytes) as process:
        process.end_input()
        begin = b""
        while (found := parse_head(begin)) is None:
            piece = await process.read()
            if not piece:
                await process.end()
                raise DatabaseError("the image ends within its head")
            begin += piece
        yield Packing(process, found[0], begin)


async def fingerprint(source: ImageSource) -> tuple[ImageHead, str]:
    """What *source* is now, and the SHA-256 of all its pages in hex. Raises DatabaseError, OSError."""
    async with pack(source) as packing, contextlib.aclosing(packing.chunks()) as chunks:
        end = b""
        async for chunk in chunks:
            end = (end + chunk)[-_TAIL_BYTES:]
    return packing.head, parse_tail(end).sha256


async def unpack(chunks: AsyncIterable[bytes], target: Path, on_bytes: OnBytes = _ignore) -> ImageHead:
    """Write the database of an image to the new file *target*, on the disk. Raises DatabaseError, OSError,
    and whatever *chunks* raises; *target* is gone or of no use then."""
    async with _Process(("unpack", str(target)), on_bytes) as process:
        await _feed(process, chunks)
        return await process.answer(ImageHead)


async def _feed(process: _Process, chunks: AsyncIterable[bytes]) -> None:
    try:
        async for chunk in chunks:
            if not await process.write(chunk):
                break
    finally:
        process.end_input()  # also after an error: whoever reads its output must not wait for more


async def apply(
    records: AsyncIterable[RecordSource], target: Path, txid: int, on_bytes: OnBytes = _ignore
) -> Applied:
    """Apply *records*, in order, to the database file *target*, which is at *txid* and which nobody has open.

    Raises DatabaseError, OSError, and whatever *records* raises; *target* is of no use then.
    """

    async def stream() -> AsyncIterator[bytes]:
        async for record in records:
            yield RECORD.pack(record.size, record.txid)
            async for chunk in record.chunks():
                yield chunk

    async with _Process(("apply", str(target), str(txid)), on_bytes) as process:
        await _feed(process, stream())
        return await process.answer(Applied)


async def to_ltx(chunks: AsyncIterable[bytes], on_bytes: OnBytes = _ignore) -> AsyncGenerator[bytes]:
    """An image as an LTX snapshot file, whole if it ends without an error. Raises as :func:`unpack`."""
    async with _Process(("to-ltx",), on_bytes) as process:
        feeding = asyncio.create_task(_feed(process, chunks), name="image to LTX")
        try:
            while piece := await process.read():
                yield piece
            await feeding
            await process.end()
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def check(database: Path, *, in_use: bool = False) -> None:
    """Have SQLite check the database. Raises DatabaseError with what is wrong with it.

    *in_use*: others may write it meanwhile; without it nobody has the file open. It reads all of it and
    takes its time: there is no deadline but that of whoever waits.
    """
    async with _Process(("check-in-use" if in_use else "check", str(database)), _ignore) as process:
        process.end_input()
        await process.end()
        if (found := await process.answer(str)) != "ok":
            raise DatabaseError(f"the database is damaged: {found}")
