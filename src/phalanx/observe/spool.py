"""Lines on disk that wait to be delivered: in order, bounded, and still there after a crash.

Files in the spool's directory:

* ``<number>.jsonl``: a *segment*, one JSON object a line. A process appends only to segments that it made
  itself, so that a line torn by a crash can only be the last one of an older segment.
* ``delivered``: the segment's number and the byte in it up to which all is delivered.
* ``<number>.jsonl.corrupt``: a segment that held something else than such lines, as it was found.

Nothing is synced to disk: what the kernel holds survives the death of the process, but not that of the
host. A position that is older than the truth only means that lines are delivered a second time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_BYTES = 64 * 1024
SEGMENTS = 8
"""A full spool loses one of that many parts at a time."""

_KEPT_CORRUPT = 3
_READ_BYTES = 256 * 1024
_SEGMENT_NAME = re.compile(r"(\d{12})\.jsonl")
_POSITION = re.compile(rb"(\d{12}) (\d{12})\n")


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    size: int
    """Bytes of whole lines."""
    lines: int
    """Lines that are not delivered."""


class Spool:
    """A first-in first-out queue of lines, in files of *directory*, of *max_bytes* at most.

    *is_line* tells whether a line is one of ours. *on_dropped* gets the lines that a full spool is about to
    lose, and returns the line that says so. *on_damage* is told what was found wrong: the sentence for
    people, and how many lines are certainly lost by it.

    Not thread-safe, and not for two processes at a time: a node's data directory is locked.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        *,
        is_line: Callable[[bytes], bool],
        on_dropped: Callable[[Sequence[bytes]], bytes],
        on_damage: Callable[[str, int], None],
    ) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes = {max_bytes}: a spool needs at least {MIN_BYTES} bytes")
        self._directory, self._max_bytes = directory, max_bytes
        self._is_line, self._on_dropped, self._on_damage = is_line, on_dropped, on_damage
        self._segments: deque[_Segment] = deque()
        self._ahead: deque[bytes] = deque()
        """Lines of the first segment that were read from the head on."""
        self._head = 0
        """Where in the first segment the first undelivered line begins."""
        self._next_number = 1
        self._writer: int | None = None
        """Open while the last segment is ours to append to."""
        self._position: int | None = None
        try:
            self._load()
        except OSError as error:
            on_damage(f"spool {directory} cannot be read: {error}", 0)

    def __len__(self) -> int:
        """How many lines are not delivered."""
        return sum(segment.lines for segment in self._segments)

    @property
    def max_line(self) -> int:
        """The longest line that is taken, in bytes."""
        return min(_READ_BYTES, self._max_bytes // SEGMENTS) - 1

    @property
    def size(self) -> int:
        """Bytes on disk, delivered lines included that are not removed yet."""
        return sum(segment.size for segment in self._segments)

    # --- writing

    def append(self, line: bytes) -> None:
        """Add one line, without its newline. Raises OSError; then nothing of it is in the spool.

        Raises ValueError if it is longer than :attr:`max_line`.
        """
        if len(line) > self.max_line:
            raise ValueError(f"a line of {len(line)} bytes is longer than {self.max_line}")
        while self._segments and self.size + len(line) + 1 > self._max_bytes:
            self._drop_oldest()
        self._write(line)

    def _write(self, line: bytes) -> None:
        data = line + b"\n"
        if self._writer is None or self._segments[-1].size + len(data) > self._max_bytes // SEGMENTS:
            self._open_segment()
        segment, writer = self._segments[-1], self._writer
        assert writer is not None
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(writer, view) :]
        except OSError:
            # Half a line may be there. If it can't be cut off either, this segment gets no more lines:
            # whoever reads it stops at its known size.
            try:
                os.ftruncate(writer, segment.size)
            except OSError:
                self._close_writer()
            raise
        segment.size += len(data)
        segment.lines += 1

    def _open_segment(self) -> None:
        self._close_writer()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / f"{self._next_number:012d}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._writer = os.open(path, flags, 0o600)
        self._segments.append(_Segment(self._next_number, path, 0, 0))
        self._next_number += 1

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            os.close(writer)

    def _drop_oldest(self) -> None:
        """Give up the oldest segment; the line that says so is written first, so a crash can't hide it."""
        if len(self._segments) == 1:
            self._close_writer()
        oldest = self._segments[0]
        if oldest.lines:
            self._write(self._on_dropped(self._undelivered(oldest)))
        self._remove_first()

    def _undelivered(self, segment: _Segment) -> list[bytes]:
        try:
            data = segment.path.read_bytes()[self._head : segment.size]
        except OSError:
            data = b"\n" * segment.lines  # Nobody can say any more what they were, but how many.
        return data.split(b"\n")[:-1]

    # --- reading

    def peek(self) -> bytes | None:
        """The oldest line that is not delivered; None if all are. The same again until :meth:`delivered`."""
        while not self._ahead and self._segments:
            first = self._segments[0]
            if self._head < first.size and self._read_ahead(first):
                break
            if len(self._segments) == 1 and self._writer is not None:
                return None
            self._remove_first()
        return self._ahead[0] if self._ahead else None

    def delivered(self, line: bytes) -> bool:
        """Move on from *line*, which :meth:`peek` gave. False if it was dropped meanwhile. Raises OSError."""
        if not self._ahead or self._ahead[0] is not line:
            return False
        self._ahead.popleft()
        first = self._segments[0]
        first.lines -= 1
        self._head += len(line) + 1
        self._save_position(first.number, self._head)
        return True

    def close(self) -> None:
        """Close the files. What is in them stays."""
        self._close_writer()
        position, self._position = self._position, None
        if position is not None:
            os.close(position)

    def _read_ahead(self, segment: _Segment) -> bool:
        """Whether there was something; if a segment can't be read it is reported, and passed over."""
        try:
            with open(segment.path, "rb") as file:
                file.seek(self._head)
                data = file.read(min(_READ_BYTES, segment.size - self._head))
            self._ahead.extend(data.split(b"\n")[:-1])
            if self._ahead:
                return True
            problem = f"no whole line at byte {self._head}"
        except OSError as error:
            problem = str(error)
        self._on_damage(f"{segment.path} cannot be read: {problem}", segment.lines)
        segment.lines = 0
        self._set_aside(segment.path)
        if segment is self._segments[-1]:
            self._close_writer()
        return False

    def _remove_first(self) -> None:
        segment = self._segments.popleft()
        self._ahead.clear()
        self._head = 0
        # If it stays for now, its number is below all that are left: it counts as delivered.
        with contextlib.suppress(OSError):
            self._save_position(self._segments[0].number if self._segments else self._next_number, 0)
        with contextlib.suppress(OSError):
            segment.path.unlink()

    def _save_position(self, number: int, offset: int) -> None:
        if self._position is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._position = os.open(self._directory / "delivered", flags, 0o600)
        os.pwrite(self._position, b"%012d %012d\n" % (number, offset), 0)

    # --- what an earlier process left

    def _load(self) -> None:
        if not self._directory.exists():
            return
        number, offset = self._read_position()
        found = {int(match[1]): path for path in self._directory.iterdir() if (match := _match(path))}
        self._next_number = max([number - 1, *found]) + 1
        for each in sorted(found):
            if each < number:
                found[each].unlink()
                continue
            try:
                self._load_segment(each, found[each], offset if each == number else 0)
            except OSError as error:
                self._on_damage(f"{found[each]} cannot be read: {error}; it is set aside", 0)
                self._set_aside(found[each])

    def _load_segment(self, number: int, path: Path, offset: int) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if torn := len(data) - whole:
            self._on_damage(f"{path}: the last line is torn ({torn} bytes); it is ignored", 1)
        if offset > whole or (offset and data[offset - 1 : offset] != b"\n"):
            self._on_damage(f"{path}: no line begins at byte {offset}; all of it is delivered again", 0)
            offset = 0
        lines = data[offset:whole].split(b"\n")[:-1]
        good = [line for line in lines if self._is_line(line)]
        if len(good) < len(lines):
            self._keep_corrupt(path)
            self._on_damage(f"{path}: {len(lines) - len(good)} of {len(lines)} lines are not readable; "
                            f"the file is kept as {path.name}.corrupt", len(lines) - len(good))  # fmt: skip
            offset = 0
            whole = self._rewrite(number, path, good)
        self._segments.append(_Segment(number, path, whole, len(good)))
        if len(self._segments) == 1:
            self._head = offset

    def _rewrite(self, number: int, path: Path, lines: Sequence[bytes]) -> int:
        """Leave only *lines* in the segment; its new size."""
        data = b"".join(line + b"\n" for line in lines)
        new = path.with_suffix(".new")
        new.write_bytes(data)
        # Position first: a crash in between delivers twice rather than passing over anything.
        if not self._segments:
            self._save_position(number, 0)
        new.replace(path)
        return len(data)

    def _read_position(self) -> tuple[int, int]:
        path = self._directory / "delivered"
        try:
            match = _POSITION.fullmatch(path.read_bytes())
        except FileNotFoundError:
            return 0, 0
        if match is None:
            self._on_damage(f"{path} is not readable; everything in the spool is delivered again", 0)
            path.replace(path.with_suffix(".corrupt"))
            return 0, 0
        return int(match[1]), int(match[2])

    def _keep_corrupt(self, path: Path) -> None:
        shutil.copyfile(path, f"{path}.corrupt")
        self._prune_corrupt()

    def _set_aside(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.replace(f"{path}.corrupt")
            self._prune_corrupt()

    def _prune_corrupt(self) -> None:
        """Corrupt files are kept for people to look at, but not without end."""
        for old in sorted(self._directory.glob("*.jsonl.corrupt"))[:-_KEPT_CORRUPT]:
            old.unlink()


def _match(path: Path) -> re.Match[str] | None:
    return _SEGMENT_NAME.fullmatch(path.name)
