"""Files that outlast a kill and a loss of power: every change is a step with a label.

The labels are for tests, which end the process just before one of them (:data:`on_step`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from phalanx.errors import DiskFull


def _go_on(label: str) -> None:
    """Nothing: outside of tests every step is taken."""


on_step: Callable[[str], None] = _go_on
"""Called before each step; what it raises, the step raises."""

_FICLONE = 0x40049409
_CHUNK_BYTES = 1 << 20
_FULL = ("no space left on device", "disk full", "disk quota exceeded", "database or disk is full")
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EBADF)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int, label: str) -> None:
    """Write all of *data* at *offset*. Raises OSError; part of it may be written then."""
    on_step(label)
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):  # a disk that is nearly full takes part of it
        written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)


def truncate(descriptor: int, size: int, label: str) -> None:
    """Make the file *size* bytes long."""
    on_step(label)
    os.ftruncate(descriptor, size)


def extend(descriptor: int, size: int, label: str) -> None:
    """Make the file at least *size* bytes long, with blocks for them: a full disk is an OSError here, and
    would be the end of the process (SIGBUS) once it is mapped."""
    on_step(label)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def sync(descriptor: int, label: str) -> None:
    """Have the disk hold what was written."""
    on_step(label)
    os.fsync(descriptor)


def sync_folder(path: Path, label: str) -> None:
    """Have the disk hold the names in *path*."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor, label)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path, label: str) -> None:
    """Rename, replacing *target*. The folders still have to be synced."""
    on_step(label)
    source.rename(target)


def unlink(path: Path, label: str) -> None:
    """Remove a file, if it is there."""
    on_step(label)
    path.unlink(missing_ok=True)


def remove_tree(path: Path, label: str) -> None:
    """Remove a folder and all in it. What cannot be removed stays."""
    on_step(label)
    shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, data: bytes, label: str) -> None:
    """A new file at *path*, on the disk; an older one is cut off. Its name still has to be synced."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_at(descriptor, data, 0, f"{label}: write")
        sync(descriptor, f"{label}: sync")
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, label: str) -> None:
    """Replace *path* by *data*: at any moment, and after a loss of power, it is the old or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_file(temporary, data, label)
    rename(temporary, path, f"{label}: rename")
    sync_folder(path.parent, f"{label}: sync folder")


def check_room(folder: Path, what: str, needed_bytes: int) -> None:
    """Raises DiskFull where *folder* has less room than that, and a tenth more so that others can go on."""
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < needed_bytes + needed_bytes // 10:
        raise DiskFull(folder, what, needed_bytes)


def is_full(error: object) -> bool:
    """Whether *error*, or its text, says that the disk is full, whoever found that out."""
    lower = str(error).lower()
    return any(words in lower for words in _FULL)


def copy(source: int, target: int, size: int, label: str) -> None:
    """The first *size* bytes of *source* into the empty file *target*; shares the blocks where that is
    possible, else the kernel copies."""
    on_step(label)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
    else:
        return
    done = _copy_range(source, target, size)
    while done < size and (chunk := os.pread(source, min(_CHUNK_BYTES, size - done), done)):
        write_at(target, chunk, done, label)
        done += len(chunk)


def _copy_range(source: int, target: int, size: int) -> int:
    """How much the kernel could copy by itself."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):
            while done < size and (count := os.copy_file_range(source, target, size - done, done, done)):
                done += count
    return done
