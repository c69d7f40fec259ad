"""What becomes of a live database whose reign has ended: by what the log holds of it, and what lies on disk.

A node that was active left its live database behind, after a hand-over or a crash. The log up to the next
reign's seal is, by definition, what was committed. So either the database is just what the log says, and
becomes a replica as it is; or nobody has taken over yet, and what is not in the log can still go there; or
it has more than the log ever will, and is set aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec


class LocalDatabase(msgspec.Struct, frozen=True):
    """What lies on disk. ``captured_txid``: the last transaction file of Litestream, 0 if there is none.

    ``unlogged_commits``: transactions on disk after the log's last one; None where that can't be told.
    ``unlogged_files``: files after the log's last one that hold a transaction each, at least.
    """

    epoch: int
    captured_txid: int
    unlogged_commits: int | None
    unlogged_files: int = 0


class LoggedReign(msgspec.Struct, frozen=True):
    """What the log holds of that reign: its last entry, and the epoch of the newest seal of all."""

    last_sequence: int
    last_txid: int
    newest_epoch: int
    known: bool = True
    """False where the log no longer holds the end of that reign."""


class Keep(msgspec.Struct, frozen=True):
    """Nobody has sealed since: the next reign of this node goes on with it, and ships what is missing."""


class MakeReplica(msgspec.Struct, frozen=True):
    """It is just what the log says at this position."""

    sequence: int
    txid: int


class SetAside(msgspec.Struct, frozen=True):
    """It has more than the log, which ends at this position. ``commits``: how many transactions more.

    ``exact``: false where it may be more of them than that; with 0, nothing is known about their number.
    """

    sequence: int
    txid: int
    commits: int
    exact: bool


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
    if is_all_logged and local.captured_txid and logged.known:
        return MakeReplica(logged.last_sequence, logged.last_txid)
    if logged.newest_epoch <= local.epoch:
        return Keep()
    commits, exact = local.unlogged_commits, logged.known
    if commits is None:
        commits, exact = (local.unlogged_files if logged.known else 0), False
    return SetAside(logged.last_sequence, logged.last_txid, commits, exact=exact)
