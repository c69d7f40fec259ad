"""The folder of a second copy: another disk, or a share that is mounted, and may stop to answer at any time.

A call to such a share returns when that is back, or never, and nothing can end it, not even SIGKILL. So every
call is made in a thread of its own, which nobody has to wait for: whoever is cancelled, or has waited for too
long, leaves it behind. One call at a time: at most one thread hangs, and one tidies up when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterable, Callable
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TypeVar

from phalanx import system
from phalanx.data import disk, ltx
from phalanx.data.second_copy import NOTE, Copied
from phalanx.errors import DatabaseError

log = logging.getLogger("phalanx.snapshots")

CALL_SECONDS = 60.0
"""How long one call may take before the folder counts as one that does not answer."""

SYNC_SECONDS = 600.0
"""The same for a call that waits until a large file is on the disk."""

T = TypeVar("T")


class CopyFolder:
    """See ``second_copy.Destination``. Its methods may be cancelled at any moment, and end at once then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        """Held by the thread whose turn it is."""
        self._since: float | None = None
        self._is_left = threading.Event()
        """Set once a call was left behind: what it was to publish may belong to a past reign then."""

    @property
    def hanging_seconds(self) -> float:
        """How long the present call has taken so far, be it left behind or not; 0 if there is none."""
        since = self._since
        return 0.0 if since is None else system.now() - since

    async def list_files(self, level: int) -> list[Copied]:
        """See ``second_copy.Destination``."""
        return await self._call(partial(self._list, level))

    def _list(self, level: int) -> list[Copied]:
        found: list[Copied] = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._level(level)):
                if (txids := ltx.parse_file_name(entry.name)) is not None:
                    found.append(Copied(level, *txids, entry.stat().st_size))
        return sorted(found)

    async def write(self, file: Copied, chunks: AsyncIterable[bytes], time: float) -> None:
        """See ``second_copy.Destination``."""
        path = self._level(file.level) / ltx.file_name(file.min_txid, file.max_txid)
        temporary = path.with_name(f"{path.name}.tmp")
        opened = await self._call(partial(_open, temporary))
        try:
            async for chunk in chunks:
                await self._call(partial(opened.write, chunk))
            await self._call(partial(self._publish, opened, temporary, path, time), SYNC_SECONDS)
        except BaseException as error:
            discard = partial(_discard, opened, temporary)
            if isinstance(error, Exception) and self._since is None:
                with contextlib.suppress(OSError, DatabaseError):
                    await self._call(discard)
            else:
                self._later(discard)
            raise

    def _publish(self, opened: BufferedWriter, temporary: Path, path: Path, time: float) -> None:
        opened.flush()
        os.fsync(opened.fileno())
        opened.close()
        os.utime(temporary, (time, time))
        self._check_not_left()
        temporary.replace(path)
        disk.sync_folder(path.parent, "second copy: sync folder")

    async def delete(self, file: Copied) -> None:
        """See ``second_copy.Destination``."""
        path = self._level(file.level) / ltx.file_name(file.min_txid, file.max_txid)
        await self._call(partial(path.unlink, missing_ok=True))

    async def read_note(self) -> bytes:
        """See ``second_copy.Destination``."""
        try:
            return await self._call((self._folder / NOTE).read_bytes)
        except FileNotFoundError:
            return b""

    async def write_note(self, data: bytes) -> None:
        """See ``second_copy.Destination``."""
        await self._call(partial(self._replace_note, data))

    def _replace_note(self, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f"{NOTE}.tmp"
        disk.write_file(temporary, data, "second copy: note")
        self._check_not_left()
        disk.rename(temporary, self._folder / NOTE, "second copy: note: rename")
        disk.sync_folder(self._folder, "second copy: note: sync folder")

    def _level(self, level: int) -> Path:
        return self._folder / "ltx" / str(level)

    # --- calls

    def _check_not_left(self) -> None:
        if self._is_left.is_set():
            raise DatabaseError("nobody waits for this file any more")

    async def _call(self, function: Callable[[], T], seconds: float = 0.0) -> T:
        """Call *function* in a thread; raises what that does, and DatabaseError: after *seconds*, and at once
        while an earlier call hangs."""
        if self._since is not None:
            raise self._does_not_answer()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._is_left.clear()
        self._since = system.now()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.done():
                return  # left behind
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # pyright: ignore[reportArgumentType]

        def work() -> None:
            result, error = None, None
            with self._lock:
                try:
                    result = function()
                except BaseException as raised:
                    error = raised
                self._since = None
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        self._start(work)
        try:
            async with asyncio.timeout(seconds or CALL_SECONDS):
                return await done
        except TimeoutError:
            raise self._does_not_answer() from None
        finally:
            if not done.done() or done.cancelled():
                self._is_left.set()

    def _does_not_answer(self) -> DatabaseError:
        return DatabaseError(
            f"{self._folder} does not answer: a call has not returned yet",
            "see to its disk or mount (copy_to); the database itself is not concerned",
        )

    def _later(self, function: Callable[[], None]) -> None:
        """Call *function* once the present call has returned, if ever. Nobody waits for it."""

        def work() -> None:
            with self._lock:
                try:
                    function()
                except OSError as error:
                    log.warning("second copy: %s", error)

        self._start(work)

    def _start(self, work: Callable[[], None]) -> None:
        # A daemon: the end of the node must not wait for it either.
        threading.Thread(target=work, name="phalanx-second-copy", daemon=True).start()


def _open(temporary: Path) -> BufferedWriter:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return BufferedWriter(FileIO(temporary, "w"), 1 << 20)


def _discard(opened: BufferedWriter, temporary: Path) -> None:
    try:
        # Not the writer itself: what it has buffered failed before, or hung, and is not wanted any more.
        opened.raw.close()
    finally:
        temporary.unlink(missing_ok=True)
