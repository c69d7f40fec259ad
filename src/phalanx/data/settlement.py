"""Carries out what ``decide.settling`` says about a live database whose reign has ended."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from phalanx import system
from phalanx.data import disk, ltx
from phalanx.data.captured_files import CapturedFiles, place_after
from phalanx.data.entries import LogRecord, Seal
from phalanx.data.log import LogEnd
from phalanx.data.replica_state import ReplicaState, WalInfo
from phalanx.data.status import DivergedFile, lacking
from phalanx.decide.settling import (
    Extent,
    Keep,
    LocalDatabase,
    LoggedReign,
    MakeReplica,
    Place,
    SealedAt,
    Seen,
    SetAside,
    extent,
    is_void,
    settle,
)
from phalanx.errors import DatabaseError

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")


class Diverged(msgspec.Struct, frozen=True):
    """What is written beside a database that was set aside. ``transactions``: how many the log lacks.

    ``exact``: false where there may be more of them. ``time``: Unix seconds. ``lost_end``: the disk has lost
    the end of the database, and with it what was captured and is not in the log.
    """

    app: str
    node: str
    epoch: int
    sequence: int
    txid: int
    transactions: int
    exact: bool
    size_bytes: int
    time: float
    file: str = ""
    reported: bool = False
    lost_end: bool = False

    @property
    def is_all_logged(self) -> bool:
        """Whether it was set aside only because its disk has lost what the log has."""
        return self.lost_end and self.exact

    def in_words(self) -> str:
        """For the audit log."""
        if self.is_all_logged:
            return (
                f"its disk has lost the end of what the log has of epoch {self.epoch}, up to {self.sequence}/"
                f"{self.txid}: it is made anew from the log; what it has left is in {self.file}"
            )
        end = "its disk has lost the end of them, what it has left is" if self.lost_end else "kept"
        return (
            f"transactions of epoch {self.epoch} after {self.sequence}/{self.txid} that are not in the log: "
            f"{lacking(self.transactions, self.exact)}; {end} in {self.file}"
        )

    def listed(self) -> DivergedFile:
        """As other nodes are told of it."""
        return DivergedFile(
            app=self.app,
            node=self.node,
            epoch=self.epoch,
            sequence=self.sequence,
            txid=self.txid,
            transactions=self.transactions,
            exact=self.exact,
            size_bytes=self.size_bytes,
            time=self.time,
            file=self.file,
        )


def _info_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def later_reigns(seals: Sequence[Seal], end_txid: int, epoch: int, node: str) -> list[Seal]:
    """The seals of reigns after *epoch*, but those of *node* itself that came to nothing. See ``is_void``."""
    all_of_them = [SealedAt(seal.epoch, seal.node, seal.txid) for seal in seals]
    return [
        seal
        for at, seal in enumerate(seals)
        if seal.epoch != epoch and not is_void(all_of_them, end_txid, at, node)
    ]


class Settlements:
    """Of one app's database on this node."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database
        self._anew = False
        """Whether Litestream has to capture anew the whole of the database that was kept."""

    async def settle(self, state: ReplicaState, end: LogEnd) -> bool:
        """Settle the live database of the reign in *state*; False where it has to be kept for now."""
        database = self._database
        if not database.live.exists():
            files = await self.captured()
            await database.replica.reset()
            if files.last:
                reason = f"{database.live} is gone; it is made anew from the log"
                database.report("database-vanished", reason, level=logging.ERROR)
            return True
        logged = await self._logged(state.epoch, state.sealed, end)
        local, wal = await self._look(state, logged)
        match settle(local, logged):
            case Keep(anew):
                await self._keep(state, logged, local, anew=anew)
                return False
            case MakeReplica(sequence, txid):
                await database.replica.demote(database.live, sequence, txid, wal)
                database.report(
                    "database-returned",
                    f"its database of epoch {state.epoch} is just what the log says at {sequence}/{txid}",
                    epoch=state.epoch,
                    transactions="0",
                )
            case SetAside() as verdict:
                await self._set_aside(state, verdict, wal)
        return True

    async def _logged(self, epoch: int, sealed: int, end: LogEnd) -> LoggedReign:
        """What the log holds of the reign that began with the seal at *sealed*."""
        wal_log = self._database.log
        seals = await wal_log.seals(sealed)
        oldest = await wal_log.oldest()  # after the seals: what is there now was there when they were read
        others = later_reigns(seals, end.txid, epoch, self._database.node)
        void = {seal.epoch for seal in seals} - {seal.epoch for seal in others}
        newest = max(epoch, *(seal.epoch for seal in others), 0 if end.epoch in void else end.epoch)
        following = others[0] if others else None
        # Snapshots of a later reign let the log go from its beginning on: then the first seal that is left
        # need not be the one that ended this reign.
        is_whole = (
            oldest is None
            or oldest.sequence <= sealed + 1
            or (isinstance(oldest, Seal | LogRecord) and oldest.epoch == epoch)
        )
        if following is not None and is_whole:
            # A seal knows the last transaction before it, even where the log itself was purged since.
            return LoggedReign(following.sequence - 1, following.txid, newest)
        if newest == epoch:
            return LoggedReign(end.sequence, end.txid, newest)
        return LoggedReign(sealed, 0, newest, known=False)

    async def _keep(
        self, state: ReplicaState, logged: LoggedReign, local: LocalDatabase, *, anew: bool
    ) -> None:
        """The next reign of this node goes on with it."""
        was_anew, self._anew = self._anew, anew
        if not anew:
            if not state.same_boot:
                with contextlib.suppress(DatabaseError, OSError):  # a disk that is full: it waits
                    await self._database.replica.vouch(is_whole=True)
        elif not was_anew:
            self._database.report(
                "database-truncated",
                f"its disk has lost transactions of epoch {state.epoch} after "
                f"{logged.last_sequence}/{logged.last_txid} that are not in the log: "
                f"{lacking(1, exact=False)}; it goes on with those that are left, "
                f"{local.unlogged_commits or 0}, and is captured anew as a whole",
                level=logging.ERROR,
                epoch=state.epoch,
                transactions="1",
                exact="false",
            )

    # --- what lies on disk

    async def captured(self) -> CapturedFiles:
        """What Litestream has left."""
        return await asyncio.to_thread(CapturedFiles, self._database.folder)

    async def _end_of_log(self, files: CapturedFiles, logged: LoggedReign) -> Place | None:
        """Where in which WAL all that the log has ends; None where that is not known."""
        place = await asyncio.to_thread(files.place_after, logged.last_txid)
        if place is None and logged.last_txid in files:  # damaged, but the log has the same file
            place = await self._place_in_log(logged)
        return place

    async def _place_in_log(self, logged: LoggedReign) -> Place | None:
        entries = await self._database.log.read(logged.last_sequence, limit=1)
        match entries:
            case [LogRecord(sequence=logged.last_sequence, txid=logged.last_txid, data=data)] if data:
                return place_after(ltx.decode_header(data[: ltx.HEADER_BYTES]))
            case _:
                return None  # in an object, or purged: then it stays unknown

    async def drop_captured(self, logged_txid: int) -> None:
        """Remove the captured files from which Litestream must not go on, so that it captures all anew."""
        files = await self.captured()
        if self._anew:
            await asyncio.to_thread(files.drop)
        else:
            await asyncio.to_thread(files.drop_broken_chain, logged_txid)

    async def _look(self, state: ReplicaState, logged: LoggedReign) -> tuple[LocalDatabase, WalInfo]:
        """What there is of the database, and its WAL as it is now."""
        database, files = self._database, await self.captured()
        place = await self._end_of_log(files, logged) if logged.known else None
        newest = await asyncio.to_thread(files.end_of, files.last)
        captured = Seen(files.last, newest or (place if files.last == logged.last_txid else None))
        salt1, salt2, offset = (place.salt1, place.salt2, place.offset) if place else (0, 0, 0)
        wal = await database.replica.live_wal_info(database.live, salt1, salt2, offset)
        end = Place(wal.salt1, wal.salt2, wal.end) if wal.end else None
        how_much = extent(end, captured, Seen(logged.last_txid, place), same_boot=state.same_boot)
        unlogged = wal.later_commits if place else None
        count = 0
        if logged.known and (unlogged is None or how_much is not Extent.WHOLE):
            count = await asyncio.to_thread(files.count_after, logged.last_txid)
        return LocalDatabase(state.epoch, files.last, unlogged, count, how_much), wal

    # --- setting aside

    async def _set_aside(self, state: ReplicaState, verdict: SetAside, wal: WalInfo) -> None:
        database = self._database
        seen = wal if database.guard is None else None  # the guard, when it closes, may empty the WAL
        await database.release_guard()
        target = self.free_name(str(state.epoch))
        what = self.note(
            target,
            epoch=state.epoch,
            sequence=verdict.sequence,
            txid=verdict.txid,
            transactions=verdict.commits,
            exact=verdict.exact,
            size_bytes=database.live.stat().st_size,
            lost_end=verdict.lost_end,
        )
        aside = await database.replica.set_aside(database.live, target, seen)
        # A program that was not found may have committed something since it was counted.
        self.report(what if aside.as_seen else replace(what, exact=False))

    def free_name(self, label: str) -> Path:
        """A name beside the database under which nothing lies yet."""
        live = self._database.live
        target, number = live.with_name(f"{live.name}.diverged-{label}"), 1
        while target.exists() or _info_path(target).exists():
            number += 1
            target = live.with_name(f"{live.name}.diverged-{label}-{number}")
        return target

    def note(
        self,
        target: Path,
        *,
        epoch: int,
        sequence: int,
        txid: int,
        transactions: int,
        exact: bool,
        size_bytes: int,
        lost_end: bool = False,
    ) -> Diverged:
        """Write down what *target* is before it is made: a crash must not leave a file that nobody knows."""
        what = Diverged(
            self._database.app,
            self._database.node,
            epoch,
            sequence,
            txid,
            transactions,
            exact,
            size_bytes,
            system.wall(),
            str(target),
            lost_end=lost_end,
        )
        disk.replace_file(_info_path(target), msgspec.json.format(msgspec.json.encode(what)), "diverged")
        return what

    def report(self, what: Diverged) -> None:
        """Tell the audit log; once, as far as the disk takes the note that it was told."""
        self._database.report(
            "database-truncated" if what.is_all_logged else "database-diverged",
            what.in_words(),
            level=logging.WARNING if what.is_all_logged else logging.ERROR,
            epoch=what.epoch,
            transactions=str(what.transactions),
            exact=str(what.exact).lower(),
            file=what.file,
        )
        info = _info_path(Path(what.file))
        told = replace(what, reported=True)
        try:
            disk.replace_file(info, msgspec.json.format(msgspec.json.encode(told)), "diverged")
        except OSError as error:
            # Nothing may depend on it: the next start tells it once more.
            log.warning("%s cannot be written, %s will be reported again: %s", info, what.file, error)

    def report_left(self) -> None:
        """Report what an earlier life of this node set aside and could not report any more."""
        for what in self.diverged():
            if not what.reported:
                self.report(what)

    def diverged(self) -> list[Diverged]:
        """What was set aside on this node, oldest first."""
        live = self._database.live
        found: list[Diverged] = []
        for path in sorted(live.parent.glob(f"{glob.escape(live.name)}.diverged-*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Diverged))
            except (OSError, msgspec.DecodeError) as error:
                log.warning("%s is unreadable: %s", path, error)
        # A note whose file was never made is what a crash left before anything had happened.
        return sorted((each for each in found if Path(each.file).exists()), key=lambda each: each.time)
