"""SQLite's WAL and its index as formats: what SQLite writes is read, what is written SQLite reads."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from phalanx.data import sqlite_wal as wal

PAGE_SIZES = [512, 1024, 4096, 16384, 65536]


def database(path: Path, page_size: int = 4096) -> sqlite3.Connection:
    """A database in WAL mode that checkpoints nothing by itself."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {page_size}")
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
    return connection


def frames_of(data: bytes, page_size: int) -> list[bytes]:
    """The frames of a log, valid or not."""
    size = page_size + wal.FRAME_HEADER_BYTES
    return [data[at : at + size] for at in range(wal.WAL_HEADER_BYTES, len(data), size)]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_log_of_sqlite_is_read_frame_by_frame(tmp_path: Path, page_size: int) -> None:
    """Every commit that SQLite wrote is found, up to a frame that is damaged."""
    connection = database(tmp_path / "a.db", page_size)
    for number in range(5):
        connection.execute("INSERT INTO t (x) VALUES (?)", (str(number) * page_size,))
    data = (tmp_path / "a.db-wal").read_bytes()
    header = wal.decode_wal_header(data)
    assert header is not None
    assert header.page_size == page_size
    found = list(wal.valid_frames(header, frames_of(data, page_size)))
    index = wal.decode_index_header((tmp_path / "a.db-shm").read_bytes()[: wal.INDEX_HEADER_BYTES])
    assert index is not None
    assert (index.frames, index.page_size, index.salts) == (len(found), page_size, header.salts)
    assert found[-1].commit == index.commit
    assert sum(frame.commit > 0 for frame in found) >= 6
    cut = found[len(found) // 2].frame
    damaged = bytearray(data)
    damaged[wal.frame_offset(cut, page_size) + wal.FRAME_HEADER_BYTES + 7] ^= 1
    assert len(list(wal.valid_frames(header, frames_of(bytes(damaged), page_size)))) == cut - 1
    connection.close()


@pytest.mark.parametrize("big_endian", [False, True])
def test_log_in_either_byte_order_is_recovered_by_sqlite(tmp_path: Path, big_endian: bool) -> None:
    """A log made here, with checksums in any byte order, gives SQLite the page that it has."""
    connection = database(tmp_path / "a.db")
    connection.execute("INSERT INTO t (x) VALUES ('before')")
    connection.execute("PRAGMA wal_checkpoint(truncate)")
    before = (tmp_path / "a.db").read_bytes()
    connection.execute("UPDATE t SET x = 'after'")
    connection.close()
    after = (tmp_path / "a.db").read_bytes()
    changed = [
        number
        for number in range(1, len(after) // 4096 + 1)
        if before[(number - 1) * 4096 : number * 4096] != after[(number - 1) * 4096 : number * 4096]
    ]
    (tmp_path / "a.db").write_bytes(before)
    head = bytearray(wal.encode_wal_header(4096, 0, b"saltsalt")[:24])
    head[3] = head[3] & 0xFE | big_endian
    s0, s1 = wal.checksum(bytes(head), 0, 0, big_endian=big_endian)
    data = bytes(head) + s0.to_bytes(4, "big") + s1.to_bytes(4, "big")
    header = wal.decode_wal_header(data)
    assert header is not None
    assert header.big_endian == big_endian
    for number in changed:
        page = after[(number - 1) * 4096 : number * 4096]
        commit = len(after) // 4096 if number == changed[-1] else 0
        frame, s0, s1 = wal.encode_frame(number, page, commit, b"saltsalt", s0, s1, big_endian)
        data += frame + page
    (tmp_path / "a.db-wal").write_bytes(data)
    assert len(list(wal.valid_frames(header, frames_of(data, 4096)))) == len(changed)
    again = sqlite3.connect(tmp_path / "a.db")
    assert again.execute("SELECT x FROM t").fetchall() == [("after",)]
    again.close()


def test_header_of_a_log_with_any_wrong_byte_is_none() -> None:
    """One changed byte anywhere makes it no header."""
    data = wal.encode_wal_header(4096, 3, b"saltsalt")
    assert wal.decode_wal_header(data) is not None
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        assert wal.decode_wal_header(bytes(damaged)) is None
    assert wal.decode_wal_header(data[:31]) is None


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_header_of_an_index_comes_back_as_it_was(page_size: int) -> None:
    """All fields, also a page size of 64 KiB, which does not fit its field as it is."""
    header = wal.IndexHeader(7, False, page_size, 12, 9, (1, 2), b"saltsalt")
    assert wal.decode_index_header(header.encode()) == header
    damaged = bytearray(header.encode())
    damaged[17] ^= 1
    assert wal.decode_index_header(bytes(damaged)) is None
    assert wal.decode_index_header(bytes(48)) is None


def lookup(memory: memoryview, page: int, frames: int) -> int:
    """The newest frame of *page* up to *frames*, by the hash tables alone, as SQLite's readers look."""
    for piece in range(wal.piece_of(frames), -1, -1):
        table = wal.Table(memory, piece)
        slots = memory[piece * 32768 + 16384 : piece * 32768 + 32768].cast("H")
        slot, found = page * 383 % 8192, 0
        while entry := slots[slot]:
            if table.before + entry <= frames and table.numbers[entry - 1] == page:
                found = max(found, table.before + entry)
            slot = (slot + 1) % 8192
        if found:
            return found
    return 0


@pytest.mark.parametrize("seed", range(3))
def test_tables_find_the_newest_frame_of_each_page(seed: int) -> None:
    """Over several pieces, and when transactions were left unfinished on the way."""
    chance = random.Random(seed)
    memory = memoryview(bytearray(4 * wal.INDEX_PIECE_BYTES))
    newest: dict[int, int] = {}
    frames = 0
    while frames < 12_500:
        pages = [chance.randint(1, 3000) for _ in range(chance.choice([1, 5, 900]))]
        abandoned = chance.random() < 0.3
        table: wal.Table | None = None
        for frame, page in enumerate(pages, frames + 1):
            if wal.piece_of(frame) > 3:
                break
            if table is None or frame > table.before + table.count:
                table = wal.Table(memory, wal.piece_of(frame))
                table.prepare(frames)
            table.add(frame, page)
            if not abandoned:
                newest[page] = frame
        if not abandoned:
            frames += len(pages)
    for page in range(1, 3001):
        assert lookup(memory, page, frames) == newest.get(page, 0)


@pytest.mark.parametrize("before", [0, 1000, 4062, 5000])
def test_what_killed_writers_left_does_not_fill_the_tables(before: int) -> None:
    """Each begins with the frames that count, and nothing else."""
    chance = random.Random(before)
    memory = memoryview(bytearray(2 * wal.INDEX_PIECE_BYTES))
    for first in (1, before + 1):
        for _ in range(1 if first == 1 else 40):
            table = wal.Table(memory, wal.piece_of(first))
            table.prepare(first - 1)
            for frame in range(first, before + 1 if first == 1 else before + 401):
                if frame > table.before + table.count:
                    table = wal.Table(memory, wal.piece_of(frame))
                    table.prepare(first - 1)
                table.add(frame, chance.randint(1, 100_000))
    table = wal.Table(memory, wal.piece_of(before + 1))
    table.prepare(before)
    begin = wal.piece_of(before + 1) * wal.INDEX_PIECE_BYTES
    slots = memory[begin + 16384 : begin + 32768].cast("H").tolist()
    assert sorted(slot for slot in slots if slot) == list(range(1, before - table.before + 1))
    assert sum(number > 0 for number in table.numbers.tolist()) == before - table.before


def test_pieces_of_the_index_begin_where_sqlite_has_them() -> None:
    """4062 frames in the first piece, 4096 in each other."""
    assert [wal.piece_of(frame) for frame in (1, 4062, 4063, 8158, 8159)] == [0, 0, 1, 1, 2]
    memory = memoryview(bytearray(2 * wal.INDEX_PIECE_BYTES))
    assert (wal.Table(memory, 0).before, wal.Table(memory, 0).count) == (0, 4062)
    assert (wal.Table(memory, 1).before, wal.Table(memory, 1).count) == (4062, 4096)
