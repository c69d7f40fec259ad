"""What an app's folder on a node holds beside databases: the state, and the journal of positions.

::

    lock         held (flock) by the replica process
    state.json   what the folder is, replaced as a whole
    gen-<n>/     replica.db, its -wal and -shm, and journal: one generation of the replica
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from phalanx.data import disk
from phalanx.data.sqlite_wal import encode_wal_header
from phalanx.data.wal_files import LogState, new_salts, wal_path
from phalanx.errors import DatabaseError
from phalanx.types import Position

FORMAT = 1
DATABASE = "replica.db"
CLOSED = "closed"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Another one after each start of this host (random(4)); empty where it is not known: not on Linux."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What ``state.json`` says. ``role``: who has the database.

    ``empty``: nobody. ``replica``: generation ``generation``, whose journal has the position. ``live``: the
    program, at ``live``, since ``epoch`` began at ``sealed`` (a sequence of the log) after ``txid``.
    ``promoting``: the files are on their way there, or there already (see :meth:`Folder.assume`).
    ``setting-aside``: they are on their way from ``live`` to ``target``. ``leftover``: which file at ``live``
    became a replica and has to be removed. ``boot``: of a live database, the boot of this host
    (:func:`boot_id`) in which all that was captured of it was there; ``closed`` where it has no WAL any more,
    as whoever closed it last has put all of it into the file.
    """

    format: int = FORMAT
    role: Literal["empty", "replica", "live", "promoting", "setting-aside"] = "empty"
    generation: int = 0
    epoch: int = 0
    sealed: int = 0
    sequence: int = 0
    txid: int = 0
    live: str = ""
    target: str = ""
    leftover: str = ""
    boot: str = ""

    @property
    def same_boot(self) -> bool:
        """Whether the host has run ever since ``boot``: a loss of power cannot have taken anything."""
        return self.boot == CLOSED or self.boot == boot_id() != ""

    @property
    def position(self) -> Position:
        """Of an empty replica, or where a live database began."""
        return Position(self.sequence, self.txid)


class Folder:
    """One app's folder, locked. Raises DatabaseError if another process has it, or it can't be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._to_sync: tuple[Path, ...] = ()
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.state = self._load()
        except BlockingIOError:
            self.close()
            raise DatabaseError(
                f"{path} is in use by another process", "end the other node with this data directory"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it. Twice is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _load(self) -> State:
        path = self.path / "state.json"
        try:
            state = msgspec.json.decode(path.read_bytes(), type=State)
        except FileNotFoundError:
            return State()
        except msgspec.DecodeError as error:
            raise DatabaseError(
                f"{path} is damaged: {error}",
                "move the folder away, and the database too if this node was active last",
            ) from error
        if state.format != FORMAT:
            raise DatabaseError(f"{path} has format {state.format}, this version knows {FORMAT}", "upgrade")
        return state

    def save(self, state: State) -> None:
        """Replace the state, on the disk when it returns. Raises OSError: it may be old or new then."""
        for path in self._to_sync:
            if path.exists():
                disk.sync_folder(path, "state: sync what it is about")
        self._to_sync = ()
        disk.replace_file(self.path / "state.json", msgspec.json.encode(state), "state")
        self.state = state

    def assume(self, state: State, moved: Sequence[Path]) -> None:
        """Be in *state* without waiting for the disk: what it says by now leads there at the next opening.

        :meth:`save_assumed` or the next :meth:`save` puts the names in the folders *moved* on the disk first.
        """
        self.state, self._to_sync = state, tuple(moved)

    def save_assumed(self) -> None:
        """Save what was assumed; nothing if that is done. Raises OSError."""
        if self._to_sync:
            self.save(self.state)

    # --- generations

    def generation_path(self, generation: int) -> Path:
        """The folder of one generation."""
        return self.path / f"gen-{generation}"

    def database_path(self, generation: int) -> Path:
        """Its database."""
        return self.generation_path(generation) / DATABASE

    def begin_generation(self, generation: int) -> Path:
        """A new, empty folder; what an attempt left there before is removed. Returns the database's path."""
        path = self.generation_path(generation)
        if path.exists():
            disk.remove_tree(path, "generation: remove left-over")
        disk.on_step("generation: make")
        path.mkdir(mode=0o700)
        return path / DATABASE

    def finish_generation(self, generation: int, page_size: int, position: Position) -> None:
        """Give the database, which is on the disk already, its log and journal, and put all on the disk."""
        path, database = self.generation_path(generation), self.database_path(generation)
        salts = new_salts()
        disk.write_file(wal_path(database), encode_wal_header(page_size, 0, salts), "generation: wal")
        entry = encode_entry(position, LogState(salts, 0, (0, 0)))
        disk.write_file(path / "journal", entry, "generation: journal")
        disk.sync_folder(path, "generation: sync")
        disk.sync_folder(self.path, "generation: sync folder")

    def remove_old_generations(self, keep: int | None) -> None:
        """Remove all others. Readers that have one open keep what they have."""
        for path in self.path.glob("gen-*"):
            if path.name != f"gen-{keep}":
                disk.remove_tree(path, "generation: remove")


# --- the journal

_ENTRY = struct.Struct(">QQ8sIII")
ENTRY_BYTES = _ENTRY.size + 4
COMPACT_BYTES = 64 << 10


def encode_entry(position: Position, state: LogState) -> bytes:
    """The database is at *position* when its log is in this state."""
    data = _ENTRY.pack(position.sequence, position.txid, state.salts, state.frames, *state.checksum)
    return data + zlib.crc32(data).to_bytes(4, "big")


class Journal:
    """Says which position the state of a log is. An entry is written before the frames that it is about."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size // ENTRY_BYTES * ENTRY_BYTES
        self._is_synced = False

    def close(self) -> None:
        """Twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def find(self, state: LogState | None) -> Position | None:
        """The newest position with this log. None: it is not known."""
        if state is None:
            return None
        wanted = [state.salts, state.frames, *state.checksum]
        data = os.pread(self._file, self.size, 0)
        for at in range(self.size - ENTRY_BYTES, -1, -ENTRY_BYTES):
            entry = data[at : at + _ENTRY.size]
            if zlib.crc32(entry) != int.from_bytes(data[at + _ENTRY.size : at + ENTRY_BYTES], "big"):
                continue
            sequence, txid, *log = _ENTRY.unpack(entry)
            if log == wanted:
                return Position(sequence, txid)
        return None

    def append(self, position: Position, state: LogState) -> None:
        """Raises OSError; the entry may be there in part then, and the next one takes its place."""
        self._is_synced = False
        disk.write_at(self._file, encode_entry(position, state), self.size, "journal: append")
        self.size += ENTRY_BYTES

    def sync(self) -> None:
        """Have the disk hold it."""
        if not self._is_synced:
            disk.sync(self._file, "journal: sync")
            self._is_synced = True

    def compact(self, position: Position, state: LogState) -> None:
        """Keep this one entry only: the log that the others are about is gone."""
        disk.replace_file(self.path, encode_entry(position, state), "journal: compact")
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self.size, self._is_synced = ENTRY_BYTES, True
