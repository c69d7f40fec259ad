"""What becomes of a live database whose reign has ended: by what the log holds of it, and what lies on disk.

A node that was active left its live database behind, after a hand-over or a crash. The log up to the next
reign's seal is, by definition, what was committed. So either the database is just what the log says, and
becomes a replica as it is; or nobody has taken over yet, and what is not in the log can still go there; or
it has more than the log ever will, and is set aside.

All that takes for granted that the disk still has what was captured from it and went into the log. Not so
after a loss of power: with ``PRAGMA synchronous = NORMAL`` the end of the WAL gets to the disk some time
after the commit. A database that is behind the log is never gone on with; it is made anew from the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import TypeAlias

import msgspec

MAX_RESTARTS = 1 << 16
"""So many times at most a WAL has begun anew since something was captured from it; it is once, as a rule."""


class Place(msgspec.Struct, frozen=True):
    """A place in one WAL, which its salts tell from others. ``offset`` in bytes."""

    salt1: int
    salt2: int
    offset: int


def reaches(end: Place | None, place: Place | None, *, same_boot: bool) -> bool:
    """Whether a database whose WAL ends at *end* (None: there is no WAL) has all that was up to *place*.

    Each time a WAL begins anew, SQLite adds one to its first salt, and before that all of it is in the
    database file, on the disk (wal.c, walRestartLog). None as *place*, no WAL or one that has nothing to do
    with *place* tells nothing: then it depends on *same_boot*, as it takes a loss of power to lose anything.
    """
    if end is not None and place is not None:
        if (end.salt1, end.salt2) == (place.salt1, place.salt2):
            return end.offset >= place.offset
        if 0 < (end.salt1 - place.salt1) % (1 << 32) <= MAX_RESTARTS:
            return True
    return same_boot


class Extent(Enum):
    """How much of what Phalanx has seen of a database the disk still has."""

    WHOLE = auto()
    """All that was captured and logged."""
    LOGGED = auto()
    """All that the log has, but not all that was captured."""
    SHORT = auto()
    """Less than the log has, or it cannot be told."""


class Seen(msgspec.Struct, frozen=True):
    """What was captured, or logged: up to a transaction (0: nothing), and its place (None: not known)."""

    txid: int
    place: Place | None


def extent(end: Place | None, captured: Seen, logged: Seen, *, same_boot: bool) -> Extent:
    """How much a database has whose WAL ends at *end*; see :func:`reaches`."""
    has_captured = not captured.txid or reaches(end, captured.place, same_boot=same_boot)
    if captured.txid >= logged.txid and has_captured:
        return Extent.WHOLE
    if 0 < captured.txid < logged.txid and logged.place is None:
        return Extent.SHORT  # of an older time: its folder was put back, say, with all that was in it
    if logged.txid and not reaches(end, logged.place, same_boot=same_boot):
        return Extent.SHORT
    return Extent.WHOLE if has_captured else Extent.LOGGED


class LocalDatabase(msgspec.Struct, frozen=True):
    """What lies on disk. ``captured_txid``: the last transaction file of Litestream, 0 if there is none.

    ``unlogged_commits``: transactions on disk after the log's last one; None where that can't be told.
    ``unlogged_files``: files after the log's last one that hold a transaction each, at least.
    """

    epoch: int
    captured_txid: int
    unlogged_commits: int | None
    unlogged_files: int = 0
    extent: Extent = Extent.WHOLE


class LoggedReign(msgspec.Struct, frozen=True):
    """What the log holds of that reign: its last entry, and the epoch of the newest seal of all."""

    last_sequence: int
    last_txid: int
    newest_epoch: int
    known: bool = True
    """False where the log no longer holds the end of that reign."""


class Keep(msgspec.Struct, frozen=True):
    """Nobody has sealed since: the next reign of this node goes on with it, and ships what is missing.

    ``anew``: its disk has lost a part of what was captured and not logged, so that Litestream must not go on
    from there: the whole database has to be captured.
    """

    anew: bool = False


class MakeReplica(msgspec.Struct, frozen=True):
    """It is just what the log says at this position."""

    sequence: int
    txid: int


class SetAside(msgspec.Struct, frozen=True):
    """It has more than the log, which ends at this position. ``commits``: how many transactions more.

    ``exact``: false where it may be more of them than that; with 0, nothing is known about their number.
    ``lost_end``: the disk has lost the end of it; ``commits`` counts what was captured of that, too. It is
    exact where all that was captured is in the log.
    """

    sequence: int
    txid: int
    commits: int
    exact: bool
    lost_end: bool = False


class SealedAt(msgspec.Struct, frozen=True):
    """What a seal says: who, which epoch, and the last transaction in the log before it."""

    epoch: int
    node: str
    txid: int


def is_void(seals: Sequence[SealedAt], end_txid: int, at: int, node: str) -> bool:
    """Whether the reign of ``seals[at]`` was this node's own, and never began: its database is as it was.

    A node notes a new reign beside its database before anything is written under it, so one that still has
    the note of an older reign has only sealed, and came to an end before it went on. *end_txid*: the last
    transaction in the log now.
    """
    after = seals[at + 1].txid if at + 1 < len(seals) else end_txid
    return seals[at].node == node and after == seals[at].txid


Settlement: TypeAlias = Keep | MakeReplica | SetAside


def settle(local: LocalDatabase, logged: LoggedReign) -> Settlement:
    """What to do with the database of a reign that has ended."""
    # A database that was there before Phalanx has no file at all until the first capture.
    is_all_logged = (local.captured_txid, local.unlogged_commits) == (logged.last_txid, 0)
    is_whole = local.extent is Extent.WHOLE
    if is_all_logged and local.captured_txid and logged.known and is_whole:
        return MakeReplica(logged.last_sequence, logged.last_txid)
    if logged.newest_epoch <= local.epoch and local.extent is not Extent.SHORT:
        return Keep(anew=not is_whole)
    commits, exact = local.unlogged_commits, logged.known
    if commits is None:
        commits, exact = (local.unlogged_files if logged.known else 0), False
    if not is_whole and not is_all_logged:
        commits, exact = max(commits, local.unlogged_files), False
    return SetAside(logged.last_sequence, logged.last_txid, commits, exact=exact, lost_end=not is_whole)
