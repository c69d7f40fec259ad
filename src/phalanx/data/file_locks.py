"""Locks on bytes of a file that exclude SQLite's own.

On Linux they are those of open file descriptions (fcntl(2), F_OFD_SETLK), which exclude the POSIX locks of
SQLite in every process, this one included, and do not get lost when some other descriptor of the same file is
closed. Elsewhere they are POSIX locks: nobody else in this process may open the file then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

SHARED, EXCLUSIVE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK

_FLOCK = struct.Struct("@hhqqi4x")
_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", None)
_GET_LOCK = getattr(fcntl, "F_OFD_GETLK", None)


def set_lock(descriptor: int, start: int, count: int, kind: int) -> bool:
    """Take a lock (or let go of it, NONE) without waiting; False if another has one in its way."""
    try:
        if _SET_LOCK is not None:
            fcntl.fcntl(descriptor, _SET_LOCK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
        else:
            how = {SHARED: fcntl.LOCK_SH, EXCLUSIVE: fcntl.LOCK_EX, NONE: fcntl.LOCK_UN}
            flags = how[kind] | (0 if kind == NONE else fcntl.LOCK_NB)
            fcntl.lockf(descriptor, flags, count, start, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def lock_holder(descriptor: int, start: int, kind: int = EXCLUSIVE) -> int | None:
    """The process whose POSIX lock on that byte is in the way of such a lock of ours; 0 if it is another's
    kind of lock, or free. None where the system does not tell."""
    if _GET_LOCK is None:
        return None
    held, pid = _ask(descriptor, start, kind, _GET_LOCK)
    return 0 if held == NONE else max(0, pid)


def is_locked(descriptor: int, start: int) -> bool:
    """Whether anybody has a lock, of whatever kind, on that byte; where the system cannot tell of those of
    this process, they are overlooked."""
    return _ask(descriptor, start, EXCLUSIVE, _GET_LOCK or fcntl.F_GETLK)[0] != NONE


def _ask(descriptor: int, start: int, kind: int, command: int) -> tuple[int, int]:
    found = fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))
    held, _, _, _, pid = _FLOCK.unpack(found)
    return held, pid
