"""Sockets in a node's folder, by which its next life meets what has outlived it. See unix(7)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from phalanx import system

_PEER = struct.Struct("3i")


@contextmanager
def short_path(path: Path) -> Generator[str]:
    """*path* within the kernel's 107 bytes however deep its folder lies. Raises OSError."""
    plain = str(path)
    if len(os.fsencode(plain)) < 100 or not system.LINUX:
        yield plain
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def bind(path: Path) -> socket.socket:
    """A socket at *path* that only this user can reach, in place of any that was there. It does not listen
    yet. Raises OSError."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if system.LINUX:
            # Its file gets the mode of the socket. Not by the umask: that is the whole process's, and what
            # other threads make meanwhile would get it too.
            os.fchmod(made.fileno(), 0o600)
        with short_path(path) as short:
            made.bind(short)
        if not system.LINUX:
            os.chmod(path, 0o600)
    except OSError:
        made.close()
        raise
    return made


def peer(channel: socket.socket) -> tuple[int, int]:
    """Who is at the other end, by the kernel's word: pid and user. Of a listener: who has begun to listen."""
    pid, user, _ = _PEER.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, user
