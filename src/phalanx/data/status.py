"""What nodes answer over NATS about an app's database, and what they are asked (docs/cli.md).

The subjects are ``names.database_subject(app, action)``; the actions:

===========  =========================  ===========================================================
``status``   no content                 each node: :class:`DbStatus`
``verify``   no content                 each node: :class:`DbVerified`
``diverged`` no content                 each node: a list of :class:`DivergedFile`
``diff``     :class:`DiffRequest`       one node: :class:`DbDifference`
``snapshot`` :class:`SnapshotRequest`   one node: :class:`SnapshotProgress`, several; the last one is done
===========  =========================  ===========================================================

A restore in place is asked for by the key ``RESTORE_KEY`` of the app's bucket, a :class:`RestoreRequest`. The
next activation carries it out and removes the key, and says what came of it in the audit log, by the action
``RESTORED`` or ``RESTORE_FAILED``.
"""

from __future__ import annotations

import msgspec

from phalanx.types import Position

RESTORE_KEY = "db.restore"
RESTORED, RESTORE_FAILED = "database-restored", "database-restore-failed"


class DbStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An app's database on one node. Sizes are bytes; 0 and empty texts where there is nothing.

    ``role``: the phase of the database there (``data.database.Phase``); ``reason``: why it is not more.
    ``position``: what was applied, or of a live database what the log has of it. ``known_end``: the last
    sequence of the log that this node knows of; ``lag_*``: how far it is behind that. ``txid``: the last
    transaction in the database, ``epoch`` its reign. ``diverged``: how many files were set aside here.

    Of a live database only: ``captured_txid`` and ``shipped_txid`` (what Litestream has, what the log has),
    ``capture_pid``, and ``spool_bytes`` that wait for the log (or, while that does not work, to be captured).
    ``snapshot``: the newest one's name.
    """

    app: str
    node: str
    role: str
    position: Position = Position()
    known_end: int = 0
    lag_records: int = 0
    lag_seconds: float = 0.0
    lag_bytes: int = 0
    size_bytes: int = 0
    page_size: int = 0
    txid: int = 0
    epoch: int = 0
    reason: str = ""
    diverged: int = 0
    captured_txid: int = 0
    shipped_txid: int = 0
    capture_pid: int = 0
    spool_bytes: int = 0
    snapshot: str = ""


class DbVerified(msgspec.Struct, frozen=True, kw_only=True):
    """What a node found when it read its whole database. ``ok``: ``PRAGMA integrity_check`` said so.

    ``fingerprint``: hex digest of all pages at *position*; equal on all nodes at equal positions. Empty
    where there is none. ``problem``: why not, or what is wrong.
    """

    node: str
    ok: bool
    position: Position = Position()
    fingerprint: str = ""
    problem: str = ""


class DivergedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A database that was set aside, because it held transactions that the log lacks.

    ``sequence`` and ``txid``: the last of it that the log has. ``transactions``: how many it lacks,
    at least that many unless ``exact`` (see :func:`lacking`). ``time``: when it was set aside, Unix seconds.
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
    file: str


def lacking(transactions: int, exact: bool) -> str:
    """How many transactions the log lacks, in words: what is not known is said to be unknown."""
    if exact:
        return str(transactions)
    return f"unknown, at least {transactions}" if transactions else "unknown"


class DiffRequest(msgspec.Struct, frozen=True):
    """Compare a diverged database (``DivergedFile.file``) with the present one. ``rows``: shown of each."""

    file: str
    rows: int = 5


class TableDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One table in which both differ. A row counts as a whole; values are shown as text, shortened.

    ``problem``: why its rows could not be compared, such as other columns.
    """

    table: str
    columns: tuple[str, ...] = ()
    only_diverged: int = 0
    only_present: int = 0
    diverged_rows: tuple[tuple[str | None, ...], ...] = ()
    present_rows: tuple[tuple[str | None, ...], ...] = ()
    problem: str = ""


class DbDifference(msgspec.Struct, frozen=True, kw_only=True):
    """All tables that differ. ``error``: why nothing could be compared, else empty."""

    node: str
    file: str
    tables: tuple[TableDifference, ...] = ()
    error: str = ""


class SnapshotRequest(msgspec.Struct, frozen=True):
    """Make a snapshot now. ``by``: who asks, for the audit log. ``quiet``: a sign of life now
    and then is enough, besides the last answer."""

    by: str = ""
    kind: str = "manual"
    quiet: bool = False


class SnapshotProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a snapshot is. The last one has ``name`` or ``error``."""

    done_bytes: int = 0
    total_bytes: int = 0
    name: str = ""
    error: str = ""

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return bool(self.name or self.error)


class RestoreRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the database should become: a snapshot by name, or the state at a sequence of the log, or at a
    time (Unix seconds); just one of them."""

    snapshot: str = ""
    position: int | None = None
    time: float | None = None
    by: str = ""
