"""What is said about a replica, in its process and in the node."""

from __future__ import annotations

import msgspec

from phalanx.types import Position

CHECKPOINT_PAGES = 1000
"""With so many frames not yet in the database file, they are moved there."""


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """``role``: ``empty``, ``replica`` or ``live``. ``state``: ``empty``, ``ready``, ``broken`` or ``live``;
    a broken replica has to be made anew, ``reason`` says why.

    ``path``: of the replica's file, if it has one. ``page_size`` in bytes, ``commit`` in pages. Of a live
    database: the ``epoch`` it was promoted in, and ``sealed``, the sequence of that epoch's seal;
    ``same_boot``: no loss of power can have taken any of it.
    """

    role: str
    state: str
    position: Position
    reason: str = ""
    path: str = ""
    page_size: int = 0
    commit: int = 0
    generation: int = 0
    epoch: int = 0
    sealed: int = 0
    same_boot: bool = False
    wal_frames: int = 0
    unwritten_frames: int = 0


class Promoted(msgspec.Struct, frozen=True):
    """``txid``: the last transaction of the live database, 0 if nothing of it is in the log. ``exists``:
    whether there is one at all; ``page_size`` is 0 where that is not known."""

    txid: int
    page_size: int
    exists: bool


class Aside(msgspec.Struct, frozen=True):
    """Where a database went. ``as_seen``: false where somebody has written to it since it was looked at."""

    path: str
    size_bytes: int
    as_seen: bool = True


class WalInfo(msgspec.Struct, frozen=True):
    """A log as it lies on disk: its salts (0: there is none), valid frames up to the last commit, commits.

    ``later_commits``: how many of them come after a place in that very log; None if it is another log.
    ``end``: where the last commit ends, in bytes.
    """

    salt1: int
    salt2: int
    frames: int
    commits: int
    later_commits: int | None
    end: int = 0
