"""``<state_dir>/keeper.json``: which keeper may outlive its node, for the node's next life to find it.

It is there as long as the node leads an app that is paused. A keeper that is named there and lives has the
session, whatever else; so the next life never begins beside it.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import msgspec

from phalanx import system, unix_socket
from phalanx.types import SessionId

log = logging.getLogger("phalanx.keeper")

NOTE = "keeper.json"
SOCKET = "keeper.sock"


class KeeperNote(msgspec.Struct, frozen=True):
    """The keeper's process on the boot with that id, and its session."""

    pid: int
    start_time: int
    boot_id: str
    session: SessionId

    @property
    def lives(self) -> bool:
        """Whether it still runs."""
        return self.boot_id == system.boot_id() and system.ProcessRef(self.pid, self.start_time).alive()


def write(state_dir: Path, session: SessionId) -> None:
    """Name this process. Logged where it fails: then the node's next life would begin anew."""
    me = system.ProcessRef.of(os.getpid())
    note = KeeperNote(me.pid, me.start_time, system.boot_id(), session)
    temporary = state_dir / f"{NOTE}.tmp"
    try:
        temporary.write_bytes(msgspec.json.encode(note))
        temporary.replace(state_dir / NOTE)
    except OSError as error:
        log.error("%s cannot be written: %s", state_dir / NOTE, error)


def remove(state_dir: Path) -> None:
    """This keeper outlives no node (any more)."""
    with suppress(OSError):
        (state_dir / NOTE).unlink(missing_ok=True)


def read(state_dir: Path) -> KeeperNote | None:
    """The keeper that is named there, dead or alive."""
    try:
        return msgspec.json.decode((state_dir / NOTE).read_bytes(), type=KeeperNote)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError) as error:
        log.error("%s is unreadable: %s", state_dir / NOTE, error)
        return None


def socket_path(state_dir: Path) -> AbstractContextManager[str]:
    """The socket's path, within the kernel's 107 bytes however deep the folder lies."""
    return unix_socket.short_path(state_dir / SOCKET)


def listen(state_dir: Path) -> socket.socket:
    """A listening socket that only this user can reach. Raises OSError."""
    made = unix_socket.bind(state_dir / SOCKET)
    try:
        made.listen(4)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
