"""Shipping: what was captured of the live database goes into the log, in order, one record at a time.

The epoch's shipper alone knows which sequence comes next. It never takes over another one: as soon as a newer
reign has sealed the log, each of its appends is refused, and it ends for good.

While NATS is away, files stay in the capture's folder and are shipped in order when it is back. A file is
removed once it is in the log and a newer one is, too: Litestream goes on from the newest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from phalanx.aio import wait_at_most
from phalanx.data import ltx
from phalanx.data.entries import Draft, Seal, SealKind
from phalanx.data.log import WalLog
from phalanx.data.records import Backlog
from phalanx.errors import BusError, DatabaseError, PhalanxError, StreamGone
from phalanx.ports import Connection
from phalanx.types import Position

log = logging.getLogger("phalanx.shipping")

APPEND_SECONDS = 5.0
RETRY_SECONDS = (0.05, 2.0)
LOOK_SECONDS = 5.0
"""Between looks at the folder that nothing asked for."""

MEASURE_SECONDS = 0.2
"""At least this long between two looks at the backlog."""

PAGE_FILES = 256
"""So many files are listed at once: while NATS is away there may come to be hundreds of thousands."""

_WAL_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_FRAMES_AT_ONCE = 256


class Captured(NamedTuple):
    """A file with one transaction of the capture."""

    txid: int
    path: Path


class Source(Protocol):
    """Where captured files come from. Neither call may take long: both are made in the event loop."""

    def files(self, after_txid: int, limit: int, /) -> Sequence[tuple[int, Path]]:
        """Transaction and path of the first *limit* of those after *after_txid*, in order."""
        ...

    def backlog(self, after_txid: int, /) -> Backlog:
        """All those after *after_txid*."""
        ...


class Shipper:
    """Ships for one epoch. The reign owns it: :meth:`start` and :meth:`stop`.

    *base*: this epoch's seal, and the last transaction before it. *wal*: the ``-wal`` file of the live
    database, to count transactions in. *on_fenced*: it has ended for good, with the reason: Fenced, or a
    DatabaseError where captured files or log are not what they should be. *on_backlog* gets bytes. *forget*:
    how to remove files up to a transaction; without it they are unlinked.
    """

    def __init__(
        self,
        wal_log: WalLog,
        source: Source,
        *,
        epoch: int,
        node: str,
        base: Position,
        on_fenced: Callable[[PhalanxError], None],
        on_backlog: Callable[[int], None] | None = None,
        on_shipped: Callable[[Position], None] | None = None,
        wal: Path | None = None,
        forget: Callable[[int], None] | None = None,
    ) -> None:
        self._log, self._source = wal_log, source
        self._epoch, self._node, self._wal, self._forget = epoch, node, wal, forget
        self._newest: Captured | None = None
        self._on_fenced, self._on_backlog, self._on_shipped = on_fenced, on_backlog, on_shipped
        self._shipped = base
        self._backlog = Backlog()
        self._captured = asyncio.Event()
        self._to_measure = asyncio.Event()
        self._connected = asyncio.Event()
        self._progress = asyncio.Event()
        self._trouble: PhalanxError | None = None
        self._failing = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._stop_listening: Callable[[], None] | None = None

    # --- life

    async def start(self) -> None:
        """Begin to ship what there is, and what comes."""
        self._stop_listening = self._log.bus.on_connection(self._on_connection)
        self.captured()
        self._tasks = [
            asyncio.create_task(self._run(), name="shipper"),
            asyncio.create_task(self._measure(), name="shipper backlog"),
        ]

    async def stop(self) -> None:
        """End at once. Whether an append under way is stored is left open; harmless when done twice."""
        if self._stop_listening is not None:
            self._stop_listening()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end(DatabaseError("shipping has ended"))

    def captured(self, txid: int = 0) -> None:
        """There are new files. Cheap; call it as often as you like."""
        self._captured.set()
        self._to_measure.set()

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self._connected.set()

    # --- what is so

    @property
    def shipped(self) -> Position:
        """How far the log has it."""
        return self._shipped

    @property
    def trouble(self) -> PhalanxError | None:
        """Why it has ended, None while it has not."""
        return self._trouble

    @property
    def failing(self) -> str:
        """Why it does not get on at present, such as a full store; empty if it does."""
        return self._failing

    def backlog(self) -> Backlog:
        """What was captured and is not in the log yet, measured a moment ago."""
        return self._backlog

    async def wait_shipped(self, txid: int, timeout: float) -> Position:
        """Wait until the log has transaction *txid*; where it then stands. Raises TimeoutError, and what
        has ended the shipper (Fenced, DatabaseError)."""
        async with asyncio.timeout(timeout):
            while self._shipped.txid < txid:
                if self._trouble is not None:
                    raise self._trouble
                await self._progress.wait()
        return self._shipped

    # --- shipping

    async def _run(self) -> None:
        try:
            await self._remove_earlier()
            while True:
                await wait_at_most(self._captured, LOOK_SECONDS)
                self._captured.clear()
                await self._ship_all()
        except PhalanxError as error:
            self._end(error)
            self._on_fenced(error)
        except Exception as error:
            log.exception("shipping failed")
            self._end(DatabaseError(f"shipping failed: {type(error).__name__}: {error}"))
            assert self._trouble is not None
            self._on_fenced(self._trouble)

    async def _ship_all(self) -> None:
        while files := self._source.files(self._shipped.txid, PAGE_FILES):
            for txid, path in files:
                file = Captured(txid, path)
                await self._ship(file)
                self._remove_before(file)

    async def _ship(self, file: Captured) -> None:
        expected = self._shipped.txid + 1
        if file.txid != expected:
            raise DatabaseError(f"transaction {expected} is missing: the capture goes on with {file.txid}")
        draft = await self._draft(file)
        sequence = await self._append(draft)
        self._shipped = Position(sequence, file.txid)
        self._failing = ""
        self._report_progress()
        self._to_measure.set()
        if self._on_shipped is not None:
            self._on_shipped(self._shipped)

    async def _draft(self, file: Captured) -> Draft:
        try:
            size = file.path.stat().st_size
            inline = size <= self._log.max_inline_bytes
            content = file.path.read_bytes() if inline else file.path
            head = content if isinstance(content, bytes) else await asyncio.to_thread(_head, file.path)
        except OSError as error:
            raise DatabaseError(f"captured file {file.path} cannot be read: {error}") from error
        header = ltx.decode_header(head[: ltx.HEADER_BYTES])
        if header.max_txid != file.txid:
            raise DatabaseError(f"captured file {file.path} holds transaction {header.max_txid}")
        commits = None if self._wal is None else await _commits(self._wal, header, in_thread=not inline)
        return Draft(self._epoch, file.txid, content, size, commits)

    async def _append(self, draft: Draft) -> int:
        """Append *draft*; while NATS does not take it, try again at growing distance."""
        delay, longest = RETRY_SECONDS
        while True:
            self._connected.clear()
            try:
                return await self._log.append(self._shipped.sequence, draft, timeout=APPEND_SECONDS)
            except BusError as error:
                if isinstance(error, StreamGone) and error.stream == self._log.stream:
                    # Nothing that is committed from now on can be kept: the section ends, loudly.
                    raise DatabaseError(f"transaction {draft.txid} cannot get in: {error}") from error
                if self._failing != str(error):
                    log.warning("transaction %d is not in the log yet: %s", draft.txid, error)
                self._failing = str(error)
            except OSError as error:
                raise DatabaseError(f"captured transaction {draft.txid} cannot be read: {error}") from error
            await wait_at_most(self._connected, delay)
            delay = min(longest, 2 * delay)

    async def _remove_earlier(self) -> None:
        """What an earlier reign has shipped and could not remove any more."""
        last = 0
        while last < self._shipped.txid and (files := self._source.files(last, PAGE_FILES)):
            for file in files:
                if file[0] <= self._shipped.txid:
                    self._remove_before(Captured(*file))
            last = files[-1][0]
            await asyncio.sleep(0)

    def _remove_before(self, file: Captured) -> None:
        """*file* is in the log and stays until a newer one is, too; the one before it goes."""
        newest, self._newest = self._newest, file
        try:
            if self._forget is not None:
                self._forget(file.txid - 1)
            elif newest is not None:
                newest.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a file that is in the log cannot be removed: %s", error)

    def _report_progress(self) -> None:
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    def _end(self, error: PhalanxError) -> None:
        if self._trouble is None:
            self._trouble = error
        self._report_progress()

    # --- the end of a reign

    async def close_log(self, timeout: float, reason: str = "stands down") -> Seal:
        """Seal the log in good order: nothing of this reign is missing from it. Nothing is shipped any more.

        Call it once all is shipped. Raises Fenced, BusError, DatabaseError.
        """
        await self.stop()
        return await self._log.seal(self._epoch, self._node, SealKind.CLOSE, reason, timeout=timeout)

    # --- the backlog

    async def _measure(self) -> None:
        while True:
            await self._to_measure.wait()
            self._to_measure.clear()
            try:
                self._backlog = self._source.backlog(self._shipped.txid)
                if self._on_backlog is not None:
                    self._on_backlog(self._backlog.bytes)
            except Exception:
                log.exception("the backlog could not be measured")
            await asyncio.sleep(MEASURE_SECONDS)


# --- counting transactions


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(ltx.HEADER_BYTES)


async def _commits(wal: Path, header: ltx.Header, *, in_thread: bool) -> int | None:
    if in_thread:
        return await asyncio.to_thread(count_commits, wal, header)
    return count_commits(wal, header)


def count_commits(wal: Path, header: ltx.Header) -> int | None:
    """How many transactions an LTX file holds: the commit frames in the part of the WAL it was made of.

    None where that can't be told, since the WAL was begun anew meanwhile or is gone. Opens no file that
    SQLite locks. (SQLite's WAL format: a frame header is page number, size of the database after a commit
    or 0, salts, checksum.)
    """
    frame = _FRAME_HEADER_BYTES + header.page_size
    offset, left = header.wal_offset, header.wal_size
    if not left or offset < _WAL_HEADER_BYTES or (offset - _WAL_HEADER_BYTES) % frame or left % frame:
        return None
    salts = header.wal_salt1.to_bytes(4, "big") + header.wal_salt2.to_bytes(4, "big")
    commits = 0
    try:
        with wal.open("rb", buffering=0) as file:
            file.seek(offset)
            while left:
                part = file.read(min(left, _FRAMES_AT_ONCE * frame))
                if not part or len(part) % frame:
                    return None
                for at in range(0, len(part), frame):
                    if part[at + 8 : at + 16] != salts:
                        return None
                    commits += part[at + 4 : at + 8] != b"\0\0\0\0"
                left -= len(part)
    except OSError:
        return None
    return commits
