"""The replica of an app's database on one node: an ordinary SQLite file that follows the log (G8).

One record of the log is one transaction, which this writes into the WAL of the file itself; readers of other
processes go on meanwhile. Where it stands is known after a kill at any moment: an entry in a journal, written
*before* the frames that it is about, says which state of the WAL is which position; which state there is,
SQLite's own rules for a WAL decide. If the journal does not know it, the replica is broken: nothing is
guessed.

Records too large for that, and those with another page size, make a new *generation*: a file beside the old
one, complete and on the disk before ``state.json`` names it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from phalanx.data import disk, handover, ltx
from phalanx.data.replica_record import Record, open_record
from phalanx.data.replica_state import CHECKPOINT_PAGES, Aside, Promoted, ReplicaState, WalInfo
from phalanx.data.replica_store import CLOSED, COMPACT_BYTES, Folder, Journal, State, boot_id
from phalanx.data.wal_files import LogState, WalFiles, is_wal_database, page_size_of
from phalanx.errors import DatabaseError, LtxError
from phalanx.types import Position

log = logging.getLogger("phalanx.data")

BIG_RECORD_PAGES = 4096
BIG_RECORD_BYTES = 64 << 20
"""A larger record makes a new generation: WAL checksums cost 0.1 ms a page, and it would lie in memory."""

_WRITE_BYTES = 1 << 20


class Replica:
    """One replica; not for several threads. Every method may raise DatabaseError and OSError: what it was to
    do has not happened then, and the position is as it was."""

    def __init__(self, folder: Folder, checkpoint_pages: int = CHECKPOINT_PAGES) -> None:
        self._folder = folder
        self._checkpoint_pages = checkpoint_pages
        self._position = folder.state.position
        self._files: WalFiles | None = None
        self._journal: Journal | None = None
        self._retry_checkpoint_at = 0
        self._is_synced = True
        self._old: WalFiles | None = None
        self._has_begun = False
        """Whether the present reign began in this process's life, and so in this boot of the host."""
        self.reason = ""
        """Why it is broken; empty if it is not."""

    @classmethod
    def open(cls, folder: Path, checkpoint_pages: int = CHECKPOINT_PAGES) -> Replica:
        """Open what lies in *folder*, which is made if need be, and finish what a kill has interrupted.

        Raises DatabaseError if another process has it or its state can't be read. A replica that can't be
        used is ``broken``: it has to be made anew.
        """
        replica = cls(Folder(folder), checkpoint_pages)
        try:
            handover.finish(replica._folder)
            replica._position = replica._folder.state.position
            replica._open_generation()
        except BaseException:
            replica.close()
            raise
        return replica

    def close(self) -> None:
        """Let go of everything. Twice is harmless."""
        self._close_generation()
        self.release_old()
        self._folder.close()

    # --- what it is

    @property
    def role(self) -> str:
        """``empty``, ``replica`` or ``live``."""
        return self._folder.state.role

    @property
    def state(self) -> str:
        """``empty``, ``ready``, ``broken`` or ``live``."""
        if self.reason:
            return "broken"
        return "ready" if self.role == "replica" else self.role

    @property
    def position(self) -> Position:
        """What is applied."""
        return self._position

    @property
    def path(self) -> Path | None:
        """The replica's file; another one after a rebuild."""
        state = self._folder.state
        return self._folder.database_path(state.generation) if state.role == "replica" else None

    @property
    def page_size(self) -> int:
        """In bytes; 0 without a file."""
        return self._files.page_size if self._files else 0

    @property
    def commit(self) -> int:
        """The size of the database in pages."""
        return self._files.commit if self._files else 0

    def describe(self) -> ReplicaState:
        """All of it."""
        state, files = self._folder.state, self._files
        return ReplicaState(
            role=state.role,
            state=self.state,
            position=self._position,
            reason=self.reason,
            path=str(self.path or ""),
            page_size=self.page_size,
            commit=self.commit,
            generation=state.generation,
            epoch=state.epoch,
            sealed=state.sealed,
            same_boot=state.role == "live" and state.same_boot,
            wal_frames=files.frames if files else 0,
            unwritten_frames=files.frames - files.backfilled if files else 0,
        )

    # --- opening

    def _open_generation(self) -> None:
        state = self._folder.state
        self._folder.remove_old_generations(state.generation if state.role == "replica" else None)
        if state.role != "replica":
            return
        path = self._folder.database_path(state.generation)
        try:
            if not is_wal_database(path):
                raise DatabaseError(f"{path} is no database in WAL mode")
            self._files = files = WalFiles.open(path)
            self._journal = journal = Journal(path.with_name("journal"))
            found = journal.find(files.log_state)
            if found is None:
                raise DatabaseError(f"the position of {path} is not known: its WAL is not what was written")
            self._position = found
        except (DatabaseError, OSError) as error:
            self._break(str(error))
        self._is_synced = False

    def _break(self, reason: str) -> None:
        log.error("the replica has to be made anew: %s", reason)
        self._close_generation()
        self.reason = reason

    def _close_generation(self) -> None:
        if self._files is not None:
            self._files.close()
        if self._journal is not None:
            self._journal.close()
        self._files = self._journal = None

    def _ready(self) -> tuple[WalFiles, Journal]:
        if self._files is None or self._journal is None:
            raise DatabaseError(f"the replica is {self.state}" + (f": {self.reason}" if self.reason else ""))
        return self._files, self._journal

    # --- following

    def apply(self, sequence: int, txid: int, data: bytes | Path) -> Position:
        """Apply the record at *sequence*, an LTX file (or where it lies) whose last transaction is *txid*.

        Raises LtxError for a damaged file, DatabaseError for one that does not follow on the position.
        """
        self._check_sequence(sequence)
        with open_record(data) as record:
            self._check_record(txid, record)
            position = Position(sequence, txid)
            if self._fits_log(record):
                self._append(position, record)
            else:
                self._rebuild(position, record)
        self._position = position
        self._checkpoint_if_due()
        return position

    def _check_sequence(self, sequence: int) -> None:
        if self.reason or self.role not in ("empty", "replica"):
            raise DatabaseError(f"the replica is {self.state}" + (f": {self.reason}" if self.reason else ""))
        if sequence <= self._position.sequence:
            raise DatabaseError(f"{sequence} is not after {self._position}")

    def _check_record(self, txid: int, record: Record) -> None:
        header = record.header
        if header.max_txid != txid:
            raise LtxError(f"it ends with transaction {header.max_txid}, not {txid}")
        if record.is_full:
            return
        if self._files is None:
            raise DatabaseError(f"transaction {txid} needs a database, and there is none")
        if header.min_txid != self._position.txid + 1:
            raise DatabaseError(f"transaction {header.min_txid} does not follow on {self._position}")
        if header.page_size != self._files.page_size:
            raise LtxError(f"pages of {header.page_size} bytes in a database of {self._files.page_size}")

    def _fits_log(self, record: Record) -> bool:
        return (
            self._files is not None
            and record.header.page_size == self._files.page_size
            and record.count <= BIG_RECORD_PAGES
            and record.count * record.header.page_size <= BIG_RECORD_BYTES
        )

    def _append(self, position: Position, record: Record) -> None:
        commit = record.header.commit
        if record.count:
            self._transact(position, record.pages(), commit)
            return
        if [*record.pages()] or commit != self.commit:
            raise LtxError(f"no page, and {commit} pages instead of {self.commit}")
        self._note(position)

    def _transact(self, position: Position, pages: Iterable[ltx.Page], commit: int) -> None:
        """Write one transaction, after the entry that explains it."""
        files, journal = self._ready()
        if files.frames >= self._checkpoint_pages:
            self._try_restart()
        transaction = files.prepare(pages, commit)
        self._is_synced = False
        journal.append(position, transaction.after)
        files.append(transaction)

    def _note(self, position: Position) -> None:
        """The database is at *position* as it is."""
        files, journal = self._ready()
        assert files.log_state is not None
        self._is_synced = False
        journal.append(position, files.log_state)

    def _try_restart(self) -> bool:
        files, journal = self._ready()

        def note(state: LogState) -> None:
            journal.append(self._position, state)
            journal.sync()

        if not files.try_restart(note):
            return False
        self._retry_checkpoint_at = 0
        if journal.size > COMPACT_BYTES and files.log_state is not None:
            journal.compact(self._position, files.log_state)
        return True

    def skip(self, sequence: int) -> Position:
        """The log has something without pages at *sequence*: a seal."""
        self._check_sequence(sequence)
        position = Position(sequence, self._position.txid)
        if self.role == "empty":
            self._folder.save(msgspec.structs.replace(self._folder.state, sequence=sequence))
        else:
            self._note(position)
        self._position = position
        return position

    def sync(self) -> Position:
        """Put all of it on the disk; what is there afterwards."""
        if self._files is not None and self._journal is not None and not self._is_synced:
            self._journal.sync()
            self._files.sync()
            self._is_synced = True
        return self._position

    def checkpoint(self) -> bool:
        """Move the WAL into the file as far as readers allow; whether nothing is left."""
        files, journal = self._ready()
        self._retry_checkpoint_at = files.frames + self._checkpoint_pages // 4
        return files.checkpoint(journal.sync)

    def _checkpoint_if_due(self) -> None:
        files = self._files
        if files is None or files.frames < max(self._checkpoint_pages, self._retry_checkpoint_at):
            return
        if files.frames - files.backfilled >= self._checkpoint_pages:
            try:
                self.checkpoint()
            except (DatabaseError, OSError) as error:
                # The record is applied all the same: this only makes the WAL longer.
                log.warning("checkpoint of the replica: %s", error)

    def rest(self) -> None:
        """What can be done while nothing comes: save the state, checkpoint, remove old generations."""
        self._folder.save_assumed()
        state = self._folder.state
        if self._files is not None and self._files.frames > self._files.backfilled:
            self.checkpoint()
        self._folder.remove_old_generations(state.generation if state.role == "replica" else None)

    # --- generations

    def _rebuild(self, position: Position, record: Record) -> None:
        """Make a new file of the present one and *record*."""
        header = record.header

        def fill(target: int) -> None:
            if not record.is_full:
                self._ready()[0].copy_to(target, "rebuild: copy")
            _write_pages(target, record)
            disk.truncate(target, header.commit * header.page_size, "rebuild: size")

        self._new_generation(position, header.page_size, fill)

    def _new_generation(self, position: Position, page_size: int, fill: Callable[[int], None]) -> None:
        """Switch to a new file that *fill* writes; all or nothing."""
        generation = self._folder.state.generation + 1
        try:
            path = self._folder.begin_generation(generation)
            target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fill(target)
                disk.sync(target, "generation: sync database")
            finally:
                os.close(target)
            self._folder.finish_generation(generation, page_size, position)
        except BaseException:
            disk.remove_tree(self._folder.generation_path(generation), "generation: give up")
            raise
        self._switch(State(role="replica", generation=generation))

    def _switch(self, state: State) -> None:
        """Save *state*, and use what it names."""
        self._folder.save(state)
        self._close_generation()
        self.reason, self._position = "", state.position
        if state.role != "replica":
            return
        path = self._folder.database_path(state.generation)
        self._files, self._journal = WalFiles.open(path), Journal(path.with_name("journal"))
        self._retry_checkpoint_at, self._is_synced = 0, True
        found = self._journal.find(self._files.log_state)
        if found is None:
            raise DatabaseError(f"the position of {path} is not known")
        self._position = found

    def install(self, image: Path, sequence: int, txid: int) -> Position:
        """The database file *image* becomes the replica, at that position. It is on this file system, and on
        the disk; it is moved, not copied."""
        if self.role not in ("empty", "replica"):
            raise DatabaseError(f"the replica is {self.state}")
        if not is_wal_database(image):
            raise DatabaseError(f"{image} is no database in WAL mode")
        with image.open("rb") as file:
            page_size = page_size_of(file.read(100))
        if not ltx.is_page_size(page_size) or image.stat().st_size % page_size:
            raise DatabaseError(f"{image} has no whole number of pages of {page_size} bytes")
        generation, position = self._folder.state.generation + 1, Position(sequence, txid)
        target = self._folder.begin_generation(generation)
        disk.rename(image, target, "install: move")
        self._folder.finish_generation(generation, page_size, position)
        self._switch(State(role="replica", generation=generation))
        return self._position

    def reset(self) -> None:
        """Forget everything: empty, at 0."""
        generation = self._folder.state.generation
        self._switch(State(generation=generation))
        self._folder.remove_old_generations(None)

    def snapshot(self, target: Path) -> Position:
        """Write the database as it is now to the new file *target*, whole and on the disk; its position."""
        files, _ = self._ready()
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        fresh = target.with_name(f"{target.name}.tmp")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                files.copy_to(descriptor, "snapshot: copy")
                disk.sync(descriptor, "snapshot: sync")
            finally:
                os.close(descriptor)
            disk.rename(fresh, target, "snapshot: rename")
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        disk.sync_folder(target.parent, "snapshot: sync folder")
        return self._position

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the database as it is now: of its file once all is checkpointed."""
        import hashlib

        digest = hashlib.sha256()
        for chunk in self._ready()[0].chunks():
            digest.update(chunk)
        return digest.hexdigest()

    # --- becoming the live database, and back

    def promote(self, live: Path, epoch: int, sealed: int = 0) -> Promoted:
        """The replica becomes the database at *live*, for *epoch*, whose seal is at *sealed* in the log.

        Litestream is prepared to go on after this transaction without writing the whole database. All or
        nothing: an interrupted promotion is finished at the next opening. An empty replica takes over what
        is at *live*, or leaves the program to create it.
        """
        state = self._folder.state
        if self.reason or state.role not in ("empty", "replica"):
            raise DatabaseError(f"the replica is {self.state}" + (f": {self.reason}" if self.reason else ""))
        place = State(
            role="live",
            generation=state.generation,
            epoch=epoch,
            sealed=sealed,
            sequence=max(sealed, self._position.sequence),
            txid=self._position.txid,
            live=str(live),
            boot=boot_id(),
        )
        self._has_begun = True
        if state.role == "empty":
            if self._position.txid:
                raise DatabaseError(f"the replica is empty, the log is at {self._position}")
            handover.ensure_clear(self._folder.path)
            self._switch(place)
            return Promoted(0, 0, live.exists())
        if live.exists():
            raise DatabaseError(f"{live} exists already", "move it away")
        files, _ = self._ready()
        began = time.time()
        if files.frames > self._checkpoint_pages * 9 // 10:
            # At 1000 frames a program's commit waits for a checkpoint: the first ones had better not.
            self.checkpoint()
            self._try_restart()
        if not files.frames:
            # Litestream goes on from the last frame.
            self._transact(self._position, [ltx.Page(1, files.read_page(1))], files.commit)
        handover.prime_capture(self._folder.path, files, self._position.txid, began)
        if not files.is_synced:  # of the journal's position alone the state will tell
            self.sync()
        handover.prepare_files(files.path, live, epoch)
        page_size = files.page_size
        self._folder.save(msgspec.structs.replace(place, role="promoting"))
        # From here on it is promoted: whatever fails, the next opening goes on with it.
        self._close_generation()
        handover.finish(self._folder)
        self._position = self._folder.state.position
        return Promoted(self._position.txid, page_size, exists=True)

    def resume(self, epoch: int, sealed: int) -> None:
        """The database that is live goes on as it is, for another epoch."""
        state = self._folder.state
        if state.role != "live":
            raise DatabaseError(f"the replica is {self.state}, there is no live database")
        self._has_begun = True
        self._folder.save(msgspec.structs.replace(state, epoch=epoch, sealed=sealed, boot=boot_id()))

    def vouch(self, *, is_whole: bool = False) -> None:
        """Note how what the live database has now can be told later, after another start of this host.

        *is_whole*: it has all that was captured, as somebody has found out. Else nothing happens where it is
        not known by now.
        """
        state = self._folder.state
        if state.role != "live" or not (is_whole or state.same_boot or self._has_begun):
            return
        boot = boot_id() if handover.has_wal(Path(state.live)) else CLOSED
        if boot != state.boot:
            self._folder.save(msgspec.structs.replace(state, boot=boot))

    def demote(self, live: Path, sequence: int, txid: int, seen: WalInfo | None = None) -> Position:
        """The database at *live*, exactly at that position, becomes a replica; its files are removed.

        *seen*: its log when that was found out. Raises DatabaseError if somebody has written since.
        Whoever has them open still gets SQLITE_BUSY when he writes, until :meth:`release_old`.
        """
        state = self._folder.state
        if state.role != "live":
            raise DatabaseError(f"the replica is {self.state}, there is no live database")
        if not is_wal_database(live):
            raise DatabaseError(f"{live} is no database in WAL mode")
        self.release_old()
        old = WalFiles.open(live)
        try:
            # The write lock is ours from here on: whoever is late has written before this, or never will.
            if seen is not None and handover.place_of(old) != (seen.salt1, seen.salt2, seen.frames):
                raise DatabaseError(f"{live} was written to while it was compared with the log")
            generation, leftover = state.generation + 1, handover.identity(live)
            handover.copy_generation(self._folder, generation, old, live.stat(), Position(sequence, txid))
            self._switch(State(role="replica", generation=generation, live=str(live), leftover=leftover))
        except BaseException:
            old.close()
            raise
        self._old = old
        handover.finish(self._folder)
        return self._position

    def release_old(self) -> None:
        """Let go of the files that :meth:`demote` has replaced."""
        if self._old is not None:
            self._old.close()
        self._old = None

    def set_aside(self, live: Path, target: Path, seen: WalInfo | None = None) -> Aside:
        """Move the database at *live* to *target*, as one file with all that was committed; then it is empty.

        An existing file is never replaced: *target* gets a number then. *seen*: its log when it was examined.
        """
        if self._folder.state.role != "live":
            raise DatabaseError(f"the replica is {self.state}, there is no live database")
        aside = handover.set_aside(self._folder, live, target, seen)
        self._position = self._folder.state.position
        return aside


def _write_pages(target: int, record: Record) -> None:
    """Write the pages to their places, neighbours together."""
    size = record.header.page_size
    buffer, first = bytearray(), 1
    for page in record.pages():
        if page.number != first + len(buffer) // size or len(buffer) >= _WRITE_BYTES:
            if buffer:
                disk.write_at(target, buffer, (first - 1) * size, "rebuild: pages")
            buffer, first = bytearray(), page.number
        buffer += page.data
    if buffer:
        disk.write_at(target, buffer, (first - 1) * size, "rebuild: pages")
