"""LTX as the real Litestream writes and reads it."""

from __future__ import annotations

import io
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from phalanx.data import ltx

LITESTREAM = str(Path(sys.executable).parent / "litestream")


def litestream(*arguments: str) -> None:
    """One run of Litestream, which must go well."""
    done = subprocess.run([LITESTREAM, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def restored(folder: Path, txid: int, to: Path) -> bytes:
    """The database as Litestream restores it from *folder*."""
    litestream("restore", "-txid", f"{txid:016x}", "-o", str(to), f"file://{folder}")
    return to.read_bytes()


def change(database: sqlite3.Connection, chance: random.Random) -> None:
    """One random change: rows, tables, indexes, everything at once."""
    size = chance.choice((10, 300, 5000))
    match chance.randrange(8):
        case 0 | 1 | 2:
            database.execute("BEGIN")
            for _ in range(chance.randint(1, 40)):
                database.execute(
                    "INSERT INTO t(x, y) VALUES (?, ?)", (chance.random(), chance.randbytes(size))
                )
            database.execute("COMMIT")
        case 3:
            database.execute(
                "UPDATE t SET y = ? WHERE id % 7 = ?", (chance.randbytes(size), chance.randrange(7))
            )
        case 4:
            database.execute("DELETE FROM t WHERE id % 3 = ?", (chance.randrange(3),))
        case 5:
            database.execute(f"CREATE TABLE t{chance.randrange(10**9)} AS SELECT * FROM t LIMIT 10")
        case 6:
            database.execute("VACUUM")
        case _:
            database.execute("DELETE FROM t")


@pytest.fixture(params=[512, 4096, 65536])
def captured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A page size, and what Litestream made of 14 rounds of random changes: 1, or several transactions a
    round, a VACUUM, WALs that begin anew, snapshots after some of them."""
    page_size: int = request.param
    chance = random.Random(page_size)
    folder = tmp_path / "replica"
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size = {page_size}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x REAL, y BLOB)")
        database.execute("CREATE INDEX i ON t(x)")
        for number in range(14):
            for _ in range(chance.randint(1, 3)):
                change(database, chance)
            if number == 6:
                database.execute("VACUUM")
            if number in (4, 9):
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            snapshot = ["-force-snapshot"] if number in (5, 11) else []
            litestream("replicate", "-once", *snapshot, str(tmp_path / "a.db"), f"file://{folder}")
        yield page_size, folder


def test_real_files_are_read_and_give_what_litestream_restores(
    captured: tuple[int, Path], tmp_path: Path
) -> None:
    """Every file of levels 0 and 9 decodes; the pages of level 0 put together are, byte for byte at each
    position, what `litestream restore` gives; a snapshot is that too."""
    page_size, folder = captured
    ours = bytearray()
    images: dict[int, bytes] = {}
    paths = sorted((folder / "ltx" / "0").iterdir())
    assert len(paths) >= 14
    for path in paths:
        data = path.read_bytes()
        file = ltx.decode(data)
        header, streamed = ltx.open_pages(io.BytesIO(data))
        assert (header, tuple(streamed)) == (file.header, file.pages)
        assert (header.min_txid, header.max_txid) == ltx.parse_file_name(path.name)
        assert header.page_size == page_size
        size = header.commit * page_size
        ours += bytes(max(0, size - len(ours)))
        for page in file.pages:
            ours[(page.number - 1) * page_size : page.number * page_size] = page.data
        del ours[size:]
        images[header.max_txid] = bytes(ours)
        assert images[header.max_txid] == restored(folder, header.max_txid, tmp_path / path.name)
    snapshots = sorted((folder / "ltx" / "9").iterdir())
    assert len(snapshots) == 2
    for path in snapshots:
        with path.open("rb") as file:
            header, pages = ltx.open_pages(file)
            assert header.is_snapshot
            assert b"".join(page.data for page in pages) == images[header.max_txid]


def test_litestream_reads_what_we_write(captured: tuple[int, Path], tmp_path: Path) -> None:
    """A snapshot and changes that we have encoded give Litestream the same database."""
    page_size, folder = captured
    paths = sorted((folder / "ltx" / "0").iterdir())
    first = len(paths) // 2
    image = restored(folder, first, tmp_path / "first.db")
    header = ltx.Header(
        page_size=page_size,
        commit=len(image) // page_size,
        min_txid=1,
        max_txid=first,
        time_ms=1_700_000_000_000,
    )
    pages = (
        ltx.Page(at // page_size + 1, image[at : at + page_size]) for at in range(0, len(image), page_size)
    )
    ours = tmp_path / "ours"
    for level in ("0", "9"):
        (ours / "ltx" / level).mkdir(parents=True)
    (ours / "ltx" / "9" / ltx.file_name(1, first)).write_bytes(ltx.encode(header, pages))
    for path in paths[first:]:
        file = ltx.decode(path.read_bytes())
        (ours / "ltx" / "0" / path.name).write_bytes(ltx.encode(file.header, file.pages, file.post_checksum))
    last = ltx.decode(paths[-1].read_bytes()).header.max_txid
    for txid in (first, last):
        ours_restored = restored(ours, txid, tmp_path / f"ours-{txid}.db")
        assert ours_restored == restored(folder, txid, tmp_path / f"theirs-{txid}.db")


def test_damaged_real_file_is_an_error(captured: tuple[int, Path]) -> None:
    """One bit turned over anywhere in a file of Litestream: LtxError, or the same pages."""
    _, folder = captured
    data = min((folder / "ltx" / "0").iterdir(), key=lambda path: path.stat().st_size).read_bytes()
    original, chance = ltx.decode(data), random.Random(1)
    refused, places = 0, chance.sample(range(len(data)), min(len(data), 400))
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << chance.randrange(8)
        try:
            assert ltx.decode(bytes(damaged)) == original
        except ltx.LtxError:
            refused += 1
    assert refused > 0.9 * len(places)
