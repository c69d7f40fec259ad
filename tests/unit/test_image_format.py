"""Packed images: what was packed is unpacked, and damage is seen."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.data import images, ltx
from phalanx.data.image_format import BLOCK_BYTES, ImageHead, Unpacker, packed, parse_head
from phalanx.data.images import apply, to_ltx
from phalanx.errors import DatabaseError


def content(pages: int, page_size: int = 512, seed: int = 1) -> bytes:
    """A database that compresses by half."""
    chance = random.Random(seed)
    return b"".join(chance.randbytes(page_size // 2) + bytes(page_size // 2) for _ in range(pages))


def blocks(data: bytes, size: int) -> Iterator[bytes]:
    """*data* in pieces."""
    return (data[at : at + size] for at in range(0, len(data), size))


def image(data: bytes, page_size: int = 512, size: int = 4096) -> bytes:
    """A packed image."""
    head = ImageHead(page_size=page_size, commit=len(data) // page_size, sequence=9, txid=7, time_ms=5)
    return b"".join(packed(head, blocks(data, size)))


def unpacked(stream: bytes) -> tuple[ImageHead, bytes]:
    """What is in an image."""
    unpacker = Unpacker(io.BytesIO(stream))
    return unpacker.head, b"".join(unpacker.blocks())


@given(st.integers(1, 60), st.sampled_from([512, 1024, 4096]), st.integers(1, 100_000))
@settings(max_examples=50, deadline=None)
def test_what_is_packed_is_unpacked(pages: int, page_size: int, block: int) -> None:
    """Head and content come back, however the blocks were cut."""
    data = content(pages, page_size, seed=pages)
    head, found = unpacked(image(data, page_size, block))
    assert found == data
    assert head == ImageHead(page_size=page_size, commit=pages, sequence=9, txid=7, time_ms=5)
    assert head.raw_bytes == len(data)


def test_large_blocks_of_zeros_are_unpacked_in_pieces() -> None:
    """Three blocks of the usual size, compressed to almost nothing: all of it within one read."""
    data = bytes(3 * BLOCK_BYTES)
    stream = image(data, 65536, BLOCK_BYTES)
    assert len(stream) < 100_000
    unpacker = Unpacker(io.BytesIO(stream))
    pieces = list(unpacker.blocks())
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= BLOCK_BYTES


def test_no_changed_byte_of_an_image_goes_unseen() -> None:
    """Each byte changed in two ways: an error, or the very same head and database (LZ4 can say the same in
    several ways)."""
    data = content(12)
    stream = image(data)
    found = parse_head(stream)
    assert found is not None
    assert found[1] < len(stream)
    for at in range(len(stream)):
        for flip in (0x01, 0x80):
            damaged = bytearray(stream)
            damaged[at] ^= flip
            try:
                got = unpacked(bytes(damaged))
            except DatabaseError:
                continue
            assert got == (found[0], data), f"byte {at} ^ {flip:#x}"


def test_image_cut_off_anywhere_or_continued_is_an_error() -> None:
    """Each proper beginning, and one with more behind it."""
    stream = image(content(12))
    for end in range(len(stream)):
        with pytest.raises(DatabaseError):
            unpacked(stream[:end])
    for more in (b"\0", stream):
        with pytest.raises(DatabaseError, match="goes on"):
            unpacked(stream + more)


def test_image_that_holds_more_or_less_than_its_head_says_is_an_error() -> None:
    """A disk is not filled by a head that lies."""
    data = content(12)
    for pages, problem in ((11, "more than its head says"), (13, "is damaged: 6144 bytes")):
        head = ImageHead(page_size=512, commit=pages, txid=1)
        with pytest.raises(DatabaseError, match=problem):
            unpacked(b"".join(packed(head, blocks(data, 4096))))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, "format 2"),
        ({"page_size": 500}, "500 bytes"),
        ({"commit": 0}, "0 pages"),
    ],
)
def test_head_of_another_kind_is_refused(change: dict[str, int], problem: str) -> None:
    """Another format, or sizes that no database has."""
    head = ImageHead(**{"page_size": 512, "commit": 12, "txid": 1, **change})
    with pytest.raises(DatabaseError, match=problem):
        unpacked(b"".join(packed(head, blocks(content(12), 4096))))


@pytest.mark.parametrize("size", [300, 512, 5000])
def test_image_becomes_an_ltx_snapshot(size: int) -> None:
    """Every page of it, whatever its blocks are."""
    data = content(12)
    out = io.BytesIO()
    to_ltx(io.BytesIO(image(data, 512, size)), out)
    file = ltx.decode(out.getvalue())
    assert (file.header.min_txid, file.header.max_txid, file.header.commit) == (1, 7, 12)
    assert b"".join(page.data for page in file.pages) == data


# --- records


def record(first: int, last: int, commit: int, pages: dict[int, bytes], page_size: int = 512) -> bytes:
    """A record as ``apply`` takes it."""
    header = ltx.Header(page_size=page_size, commit=commit, min_txid=first, max_txid=last)
    data = ltx.encode(header, [ltx.Page(*page) for page in sorted(pages.items())])
    return images.RECORD.pack(len(data), last) + data


def database(path: Path, pages: int) -> bytes:
    """A file that says that its pages have 512 bytes."""
    data = bytearray(content(pages))
    data[16:18] = (512).to_bytes(2, "big")
    path.write_bytes(data)
    return bytes(data)


def test_records_are_applied(tmp_path: Path) -> None:
    """It grows, shrinks, is replaced by a full record, also of another page size."""
    path = tmp_path / "a.db"
    data = database(path, 4)
    one, two = b"1" * 512, b"2" * 512
    stream = record(8, 8, 6, {2: one, 6: two}) + record(9, 9, 3, {3: two})
    done = apply(io.BytesIO(stream), path, 7)
    assert (done.txid, done.commit, done.page_size) == (9, 3, 512)
    assert path.read_bytes() == data[:512] + one + two
    full = {number: bytes([number]) * 1024 for number in (1, 2)}
    done = apply(io.BytesIO(record(20, 20, 2, full, 1024)), path, 9)
    assert (done.txid, done.commit, done.page_size) == (20, 2, 1024)
    assert path.read_bytes() == full[1] + full[2]


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (record(9, 9, 4, {2: b"1" * 512}), "after transaction 7 comes 9: some are missing"),
        (record(7, 7, 4, {2: b"1" * 512}), "after transaction 7 comes 7: some are missing"),
        (record(8, 8, 4, {2: b"1" * 1024}, 1024), "some are missing"),
        (record(8, 8, 4, {2: b"1" * 512})[:-1], "ends in its trailer"),
        (record(8, 8, 4, {2: b"1" * 512})[:9], "within one"),
        (images.RECORD.pack(0, 8), "ends in its header"),
        (
            record(8, 8, 4, {2: b"1" * 512})[:15] + b"\x09" + record(8, 8, 4, {2: b"1" * 512})[16:],
            "9 holds 8",
        ),
    ],
)
def test_records_that_do_not_go_on_are_errors(tmp_path: Path, stream: bytes, problem: str) -> None:
    """A gap, the same transaction again, another page size, damage."""
    path = tmp_path / "a.db"
    database(path, 4)
    with pytest.raises(DatabaseError, match=problem):
        apply(io.BytesIO(stream), path, 7)
