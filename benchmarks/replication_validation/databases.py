"""What the databases hold in the end: the live one, the replicas, those set aside, and what the log says.

Each is read as any program would read it; the log is applied here by itself, record by record, so that there
is a second opinion on what was committed at any position.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import msgspec

from phalanx.bus.connection import NatsBus
from phalanx.data import ltx
from phalanx.data.entries import Foreign, LogRecord, Seal
from phalanx.data.log import WalLog
from phalanx.names import Names
from phalanx.testing.committing import text_of
from phalanx.types import Position

READ_SECONDS = 10.0


class Content(msgspec.Struct, frozen=True):
    """What a database holds. ``rows``: number → (epoch, node) of the test program's transactions.

    ``vacuums`` and ``captures`` count what else was committed, from whatever beginning: changes of the schema
    and VACUUMs, and transactions of Litestream itself. ``problems``: what is wrong with the file.
    """

    rows: dict[int, tuple[int, str]]
    vacuums: int = 0
    captures: int = 0
    fingerprint: str = ""
    problems: tuple[str, ...] = ()

    def lost_to(self, other: Content) -> list[tuple[int, int]]:
        """The (number, epoch) of the rows that *other* lacks."""
        return [(n, row[0]) for n, row in sorted(self.rows.items()) if other.rows.get(n) != row]


def read(file: Path) -> Content:
    """Read the database *file*, whole. What SQLite says against it becomes a problem, never an error."""
    try:
        connection = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=READ_SECONDS)
        try:
            return _content(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Content({}, problems=(f"{type(error).__name__}: {error}",))


def _content(connection: sqlite3.Connection) -> Content:
    connection.execute("BEGIN")
    problems = [line for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    rows: dict[int, tuple[int, str]] = {}
    if "entries" in tables:
        for number, epoch, node, text in connection.execute("SELECT * FROM entries"):
            rows[number] = epoch, node
            if text != text_of(number):
                problems.append(f"row {number} of epoch {epoch} holds something else than was committed")
    if "cells" in tables:
        problems += [
            f"{count} of the {cells} cells of transaction {number} are there"
            for number, cells, count in connection.execute(
                "SELECT number, cells, count(*) FROM cells GROUP BY number, cells"
            )
            if count != cells or number not in rows
        ]
    captures = 0
    if "_litestream_seq" in tables:
        captures = connection.execute("SELECT coalesce(max(seq), 0) FROM _litestream_seq").fetchone()[0]
    vacuums = connection.execute("PRAGMA schema_version").fetchone()[0]
    fingerprint = hashlib.sha256(connection.serialize()).hexdigest()
    return Content(rows, vacuums, captures, fingerprint, (*problems, *out_of_order(rows)))


def out_of_order(rows: dict[int, tuple[int, str]]) -> list[str]:
    """Every reign goes on where the one before ended: numbers have no gap, and epochs never go back."""
    problems: list[str] = []
    before, epoch = 0, 0
    for number in sorted(rows):
        if number != before + 1:
            problems.append(f"rows {before + 1} to {number - 1} are missing before row {number}")
        if rows[number][0] < epoch:
            problems.append(f"row {number} is of epoch {rows[number][0]}, the one before of {epoch}")
        before, epoch = number, rows[number][0]
    return problems


def replica_of(live: Path) -> Path:
    """The file that is read at present on the node whose live database would be *live*. Raises OSError."""
    folder = live.parent / f".{live.name}-phalanx"
    state = msgspec.json.decode((folder / "state.json").read_bytes())
    if state["role"] == "replica":
        return folder / f"gen-{state['generation']}" / "replica.db"
    return live


class Replayed(msgspec.Struct, frozen=True):
    """The whole log, applied. ``at``: what the database held at the positions that were asked for."""

    end: Position
    final: Content
    at: dict[int, Content]
    seals: list[Seal]
    problems: list[str]


async def replay(bus: NatsBus, names: Names, app: str, wanted: Iterable[int], folder: Path) -> Replayed:
    """Apply the log of *app* from its beginning to its end, in *folder*.

    *wanted*: the sequences after which to look. Raises BusError, LtxError, DatabaseError.
    """
    wal_log = WalLog(bus, names, app)
    image = _Image(folder / "image.db")
    left, at = sorted(set(wanted)), dict[int, Content]()
    seals, problems = list[Seal](), list[str]()
    position, epoch, end = Position(0, 0), 0, (await wal_log.state()).last
    while position.sequence < end:
        for entry in await wal_log.read(position.sequence + 1, limit=1024):
            while left and left[0] < entry.sequence:
                at[left.pop(0)] = image.content()
            if entry.sequence != position.sequence + 1:
                problems.append(f"the log goes on at {entry.sequence} after {position.sequence}")
            position = Position(entry.sequence, position.txid)
            if isinstance(entry, Foreign):
                problems.append(f"the log holds something foreign at {entry.sequence}: {entry.problem}")
            elif entry.epoch < epoch:
                problems.append(f"the log has epoch {entry.epoch} at {entry.sequence}, after {epoch}")
            else:
                epoch = entry.epoch
            if isinstance(entry, Seal):
                seals.append(entry)
            elif isinstance(entry, LogRecord):
                if entry.txid != position.txid + 1:
                    problems.append(f"the log has {entry.txid} at {entry.sequence} after {position.txid}")
                image.apply(await _ltx(wal_log, entry, folder))
                position = Position(entry.sequence, entry.txid)
    final = image.content()
    at.update(dict.fromkeys(left, final))
    return Replayed(position, final, at, seals, problems)


async def _ltx(wal_log: WalLog, record: LogRecord, folder: Path) -> ltx.LtxFile:
    if record.pointer is None:
        return ltx.decode(record.data)
    file = folder / "record.ltx"
    await wal_log.download(record, file)
    return ltx.decode(file.read_bytes())


class _Image:
    """A database file whose pages are written one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def apply(self, file: ltx.LtxFile) -> None:
        size = file.header.page_size
        with self._path.open("r+b") as image:
            for page in file.pages:
                image.seek((page.number - 1) * size)
                image.write(page.data)
            image.truncate(file.header.commit * size)

    def content(self) -> Content:
        content = read(self._path)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        return content
