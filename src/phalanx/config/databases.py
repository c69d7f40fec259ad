"""What users declare of an app's database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from phalanx.config import rules, texts
from phalanx.config.aliases import ByteCount, PathText, Seconds, default
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About
from phalanx.errors import ConfigError

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


class DatabaseFile(texts.File, frozen=True):
    """The path of a SQLite database, made absolute. Whether it can be used is for the preflight."""

    of_database: bool = True

    def __call__(self, key: str, value: object) -> str:
        text = super().__call__(key, value)
        remedy = "write the path of a file, such as data/wiki.db"
        if not text:
            raise ConfigError(key, value, "empty", remedy)
        if text.startswith("file:"):
            raise ConfigError(key, value, "a URI, not a path", remedy)
        if text == ":memory:":
            raise ConfigError(key, value, "a database in memory cannot be followed", remedy)
        if text.endswith(("/", "/.", "/..")) or text in (".", ".."):
            raise ConfigError(key, value, "a folder, not a file", remedy)
        return text


class _Path(Declaration, frozen=True):
    path: Annotated[
        PathText,
        About(
            "The database file, which a program opens while the app is active here. It need not exist. Its "
            "folder must, on a local disk with room for a second copy. It is switched to WAL mode if it is "
            "in another one.",
            DatabaseFile(),
        ),
    ]


class SQLite(_Path, frozen=True, kw_only=True, tag="sqlite", tag_field="type"):
    """A SQLite database that follows to the standbys, and that a failover promotes.

    Any program may write it, by any driver, while the app is active on this node. Beside it lies a folder
    `.<file name>-phalanx`, which belongs to Phalanx.
    """

    sync: Annotated[
        Literal["auto", "server", "standby"],
        About(
            "What `db.sync()` waits for. `server`: NATS has acknowledged the commit. `standby`: one standby "
            "has it on its disk. `auto`: `server` where the log has 2 replicas or more, else `standby`.",
            rules.Choice(("auto", "server", "standby")),
            trade_off="`standby` is never confirmed while there is no standby.",
        ),
    ] = "auto"
    sync_timeout: Annotated[
        Seconds, About("Deadline of `db.sync()`, unless the call says another.", rules.Duration(0.01, HOUR))
    ] = default(5.0)
    snapshot_every: Annotated[
        Seconds,
        About(
            "From one snapshot to the next, while there are writes.",
            rules.Duration(MINUTE, 7 * DAY),
            trade_off="Frequent ones make a new standby ready sooner and cost storage and a full read of the "
            "replica each.",
        ),
    ] = default(HOUR)
    keep_snapshots: Annotated[int, About("Snapshots that are kept, at most.", rules.Whole(1, 10_000))] = 24
    keep_snapshots_for: Annotated[
        Seconds,
        About(
            "Older snapshots are deleted. The newest good one is kept whatever its age.",
            rules.Duration(MINUTE, 3650 * DAY),
            trade_off="How far back a restore can go, against storage in NATS.",
        ),
    ] = default(7 * DAY)
    log_limit: Annotated[
        ByteCount,
        About(
            "Bytes of log after the newest snapshot that make a new one due, before its time.",
            rules.Bytes(MIB, TIB),
            trade_off="Small ones bound what a new standby has to fetch, and cost more snapshots.",
        ),
    ] = default(GIB)
    spool_limit: Annotated[
        ByteCount,
        About(
            "Committed bytes that are not in the log yet, because NATS is away, or because they cannot be "
            "captured (a full disk). Beyond it the active section ends.",
            rules.Bytes(MIB, TIB),
            trade_off="It bounds the disk, and what is missing if the node is lost meanwhile.",
        ),
    ] = default(GIB)
    max_lag: Annotated[
        Seconds,
        About(
            "A standby whose replica is further behind is no candidate.",
            rules.Duration(0.1, DAY),
            trade_off="Short ones never promote an old state, long ones keep more candidates.",
        ),
    ] = default(30.0)
    copy_to: Annotated[
        PathText,
        About(
            "A folder that gets a second copy of all snapshots and records, in Litestream's own layout: "
            "`litestream restore` reads it without Phalanx.",
            texts.File(of_database=True),
            default="none",
        ),
    ] = default("")

    @property
    def folder(self) -> Path:
        """The folder beside the database that belongs to Phalanx."""
        return folder_of(self.path)


def folder_of(path: str) -> Path:
    """Where Phalanx keeps what it needs for the database *path*: on the same file system, for renames."""
    file = Path(path)
    return file.parent / f".{file.name}-phalanx"
