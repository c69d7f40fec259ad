"""LTX files, both ways: what was written is read, and damage is seen."""

from __future__ import annotations

import io
import itertools
import random
import tracemalloc
from collections.abc import Iterator

import lz4.frame
import msgspec
import pytest
from fastcrc import crc64
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.data import ltx
from phalanx.errors import LtxError

PAGE_SIZES = [512 << shift for shift in range(8)]
FLAG = 1 << 63


def content(seed: int, page_size: int) -> bytes:
    """A page that compresses somewhat (an odd *seed*) or not at all."""
    noise = random.Random(seed).randbytes(page_size)
    return noise[: page_size // 3] + bytes(page_size - page_size // 3) if seed % 2 else noise


@st.composite
def files(draw: st.DrawFn) -> tuple[ltx.Header, list[ltx.Page], int]:
    """A header, pages that fit it, the checksum of the database where one is kept."""
    page_size = draw(st.sampled_from(PAGE_SIZES))
    tracks, snapshot = draw(st.booleans()), draw(st.booleans())
    commit = draw(st.integers(1, 6 if snapshot else 2**32 - 1))
    numbers = range(1, commit + 1)
    if not snapshot:
        lock = ltx.lock_page(page_size)
        chosen = draw(st.sets(st.one_of(st.integers(1, min(commit, 20)), st.integers(1, commit)), max_size=6))
        numbers = sorted(chosen - {lock})
    pages = [ltx.Page(number, content(draw(st.integers(0, 9)), page_size)) for number in numbers]
    first = 1 if snapshot else draw(st.integers(2, 2**63))
    wal = draw(st.booleans())
    header = ltx.Header(
        page_size=page_size,
        commit=commit,
        min_txid=first,
        max_txid=draw(st.integers(first, 2**64 - 1)),
        time_ms=draw(st.integers(-(2**63), 2**63 - 1)),
        flags=0 if tracks else ltx.NO_CHECKSUM,
        pre_checksum=draw(st.integers(FLAG, 2**64 - 1)) if tracks and not snapshot else 0,
        wal_offset=draw(st.integers(1, 2**63 - 1)) if wal else 0,
        wal_size=draw(st.integers(0, 2**63 - 1)) if wal else 0,
        wal_salt1=draw(st.integers(0, 2**32 - 1)) if wal else 0,
        wal_salt2=draw(st.integers(0, 2**32 - 1)) if wal else 0,
        node_id=draw(st.integers(0, 2**64 - 1)),
    )
    rolling = FLAG
    for page in pages:
        rolling = FLAG | rolling ^ ltx.page_checksum(page.number, page.data)
    post = 0 if not tracks else rolling if snapshot else draw(st.integers(FLAG, 2**64 - 1))
    return header, pages, post


@given(files())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(file: tuple[ltx.Header, list[ltx.Page], int]) -> None:
    """Header, pages and checksum come back, in one piece and as a stream, for every page size."""
    header, pages, post = file
    data = ltx.encode(header, pages, post)
    assert ltx.decode(data) == ltx.LtxFile(header, tuple(pages), post)
    assert ltx.decode_header(data) == header
    streamed, rest = ltx.open_pages(io.BytesIO(data))
    assert streamed == header
    assert list(rest) == pages


def small_file(page_size: int = 512, *, snapshot: bool = False) -> bytes:
    """A file with every kind of page."""
    numbers = range(1, 5) if snapshot else (2, 3, 7, 2**30)
    header = ltx.Header(
        page_size=page_size,
        commit=4 if snapshot else 2**31,
        min_txid=1 if snapshot else 5,
        max_txid=6,
        time_ms=1_700_000_000_000,
        wal_offset=32,
        wal_size=4000,
        wal_salt1=7,
        wal_salt2=8,
        node_id=3,
    )
    pages = [ltx.Page(number, content(number, page_size)) for number in numbers]
    pages[-1] = ltx.Page(pages[-1].number, bytes(page_size))
    return ltx.encode(header, pages)


def payloads(data: bytes) -> set[int]:
    """Where the compressed pages are, read off the file without the module under test."""
    found: set[int] = set()
    at = 100
    while data[at : at + 6] != bytes(6):
        size = int.from_bytes(data[at + 6 : at + 10], "big")
        found.update(range(at + 10, at + 10 + size))
        at += 10 + size
    return found


@pytest.mark.parametrize("snapshot", [False, True])
def test_no_changed_byte_goes_unseen(snapshot: bool) -> None:
    """Each byte of a file changed in several ways: an error. Only another compressed form of the very same
    page passes, which the format's checksum does not cover."""
    data = small_file(snapshot=snapshot)
    original, compressed = ltx.decode(data), payloads(data)
    same = 0
    for at, flip in itertools.product(range(len(data)), (0x01, 0x80, 0xFF, 0x10)):
        damaged = bytearray(data)
        damaged[at] ^= flip
        try:
            file = ltx.decode(bytes(damaged))
        except LtxError:
            continue
        assert at in compressed, f"byte {at} ^ {flip:#x}"
        assert file == original, f"byte {at} ^ {flip:#x}"
        same += 1
    assert same < len(data) / 50


@given(st.integers(0, 2**63 - 1), st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_damage_of_any_kind_is_an_error_or_changes_nothing(where: int, junk: bytes) -> None:
    """Some bytes replaced by others anywhere: nothing but LtxError, nothing but the same pages."""
    data = small_file()
    at = where % len(data)
    damaged = data[:at] + junk + data[at + len(junk) :]
    try:
        file = ltx.decode(damaged)
    except LtxError:
        return
    assert file == ltx.decode(data)


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_junk_is_an_error(junk: bytes, after_a_header: bool) -> None:
    """What is no LTX file raises LtxError, also behind a good header."""
    with pytest.raises(LtxError):
        ltx.decode(small_file()[:100] + junk if after_a_header else junk)


def test_a_file_cut_off_anywhere_or_continued_is_an_error() -> None:
    """Each proper beginning of a file, and a file with more behind it."""
    data = small_file(snapshot=True)
    for end in range(len(data)):
        with pytest.raises(LtxError):
            ltx.decode(data[:end])
    for more in (b"\0", data):
        with pytest.raises(LtxError, match="goes on"):
            ltx.decode(data + more)


def test_stream_says_at_its_end_that_it_was_wrong() -> None:
    """The pages of a file with a wrong checksum come, then the error instead of the end."""
    data = small_file()
    header, pages = ltx.open_pages(io.BytesIO(data[:-1] + bytes([data[-1] ^ 1])))
    assert header.max_txid == 6
    assert [next(pages).number for _ in range(4)] == [2, 3, 7, 2**30]
    with pytest.raises(LtxError, match="checksum"):
        next(pages)


def varint(value: int) -> bytes:
    """Base 128, written anew here."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes(groups) + bytes([value])


def forged(
    header: bytes,
    pages: dict[int, tuple[bytes, bytes]],
    *,
    post: int = 0,
    index_flip: int = 0,
    extra: int = 0,
) -> bytes:
    """A file of the older kind (LZ4 frames without a size) with a correct checksum, whatever is in it.

    *pages*: frame and content by number. *index_flip*: what is wrong with the last place in the index;
    *extra*: what is wrong with its size.
    """
    summed, out, index = bytearray(header), bytearray(header), bytearray()
    for number, (frame, data) in pages.items():
        prefix = number.to_bytes(4, "big") + bytes(2)
        index += varint(number) + varint(len(out) ^ index_flip) + varint(6 + len(frame))
        out += prefix + frame
        summed += prefix + data
    index += b"\0"
    size = len(index) + extra
    tail = bytes(6) + bytes(index) + size.to_bytes(8, "big") + post.to_bytes(8, "big")
    return bytes(out) + tail + (crc64.go_iso(bytes(summed) + tail) | FLAG).to_bytes(8, "big")


def old_file(frames: dict[int, bytes], pages: dict[int, bytes], page_size: int = 512) -> bytes:
    """*pages* as older *frames*."""
    both = {number: (frame, pages[number]) for number, frame in frames.items()}
    return forged(small_file(page_size)[:100], both)


class Measured(io.BytesIO):
    """A file that is never asked for more at once than a page can need."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 <= size < 70_000
        return super().read(size)


@pytest.mark.parametrize("store_size", [True, False])
@pytest.mark.parametrize("content_checksum", [True, False])
@pytest.mark.parametrize("block_checksum", [True, False])
def test_older_pages_are_read(store_size: bool, content_checksum: bool, block_checksum: bool) -> None:
    """Pages as LZ4 frames whose length nothing says, with every option that such a frame can have."""
    for page_size in (512, 4096, 65536):
        pages = {number: content(number, page_size) for number in (1, 2, 9)}
        frames = {
            number: lz4.frame.compress(
                data, store_size=store_size, content_checksum=content_checksum, block_checksum=block_checksum
            )
            for number, data in pages.items()
        }
        file = ltx.decode(old_file(frames, pages, page_size))
        assert {page.number: page.data for page in file.pages} == pages


def test_older_pages_that_lie_about_their_size_are_errors() -> None:
    """A frame that says it has 2^62 bytes, or a block of 2 GB, costs no memory and raises LtxError."""
    page = content(1, 512)
    frame = bytearray(lz4.frame.compress(page, store_size=True, content_checksum=True))
    for damaged in (
        frame[:6] + (2**62).to_bytes(8, "little") + frame[14:],
        frame[:15] + (2**31 - 1).to_bytes(4, "little") + frame[19:],
        lz4.frame.compress(page + b"x"),
        lz4.frame.compress(page[:-1]),
        lz4.frame.compress(b""),
        b"\0" * 30,
    ):
        tracemalloc.start()
        with pytest.raises(LtxError):
            ltx.decode(old_file({1: bytes(damaged)}, {1: page}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_pages_that_lie_about_their_size_are_errors() -> None:
    """A size of 4 GB is not even read."""
    data = bytearray(small_file())
    data[106:110] = b"\xff" * 4
    with pytest.raises(LtxError, match="compressed"):
        list(ltx.open_pages(Measured(data))[1])
    frame = bytearray(lz4.frame.compress(content(1, 512), store_size=False))
    frame[7:11] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(LtxError, match="large"):
        list(ltx.open_pages(Measured(old_file({1: bytes(frame)}, {1: b""})))[1])


def test_file_that_is_wrong_under_a_correct_checksum_is_an_error() -> None:
    """A writer that is not to be trusted: its index, its completeness, the page with the locks, the checksum
    of the database."""
    page = content(2, 512)
    lock, both = ltx.lock_page(512), (lz4.frame.compress(page), page)
    changes = small_file()[:100]
    snapshot = ltx.encode(ltx.Header(page_size=512, commit=1, min_txid=1, max_txid=1), [ltx.Page(1, page)])
    two = snapshot[:12] + b"\0\0\0\2" + snapshot[16:100]
    tracked = snapshot[:4] + bytes(4) + snapshot[8:100]
    rolling = ltx.page_checksum(1, page)
    assert ltx.decode(forged(changes, {2: both, 9: both})).pages[1] == ltx.Page(9, page)
    assert ltx.decode(forged(tracked, {1: both}, post=rolling)).post_checksum == rolling
    for data, problem in (
        (forged(changes, {2: both}, index_flip=1), "index"),
        (forged(changes, {2: both}, extra=1), "index"),
        (forged(changes, {lock: both}), "page"),
        (forged(changes, {3: both, 2: both}), "after page 3"),
        (forged(changes, {2: both}, post=FLAG), "none is kept"),
        (forged(two, {1: both}), "a snapshot of 2 pages with 1"),
        (forged(tracked, {1: both}, post=1), "no checksum"),
        (forged(tracked, {1: both}, post=rolling ^ 1), "the trailer says"),
    ):
        with pytest.raises(LtxError, match=problem):
            ltx.decode(data)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"page_size": 513}, "page size"),
        ({"page_size": 256}, "page size"),
        ({"page_size": 131072}, "page size"),
        ({"flags": 1}, "flags"),
        ({"commit": 0}, "without pages"),
        ({"min_txid": 0}, "transactions"),
        ({"max_txid": 4}, "transactions"),
        ({"pre_checksum": FLAG}, "before"),
        ({"flags": 0}, "no checksum"),
        ({"flags": 0, "pre_checksum": 1}, "no checksum"),
        ({"min_txid": 1, "flags": 0, "pre_checksum": FLAG}, "before"),
        ({"wal_size": 1}, "WAL"),
        ({"wal_salt1": 1}, "WAL"),
        ({"wal_salt2": 1}, "WAL"),
        ({"wal_offset": -1}, "WAL"),
        ({"wal_offset": 32, "wal_size": -1}, "WAL"),
    ],
)
def test_header_that_may_not_be_is_refused_both_ways(change: dict[str, int], problem: str) -> None:
    """The rules of the format for headers, when writing and when reading."""
    good = ltx.Header(page_size=512, commit=9, min_txid=5, max_txid=6)
    with pytest.raises(LtxError, match=problem):
        ltx.encode(msgspec.structs.replace(good, **change), [])
    names = ("flags", "page_size", "commit", "min_txid", "max_txid", "time_ms", "pre_checksum")
    names += ("wal_offset", "wal_size", "wal_salt1", "wal_salt2")
    ends = (8, 12, 16, 24, 32, 40, 48, 56, 64, 68, 72)
    data = bytearray(ltx.encode(good, []))
    for name, value in change.items():
        end = ends[names.index(name)]
        begin = ([4, *ends])[names.index(name)]
        data[begin:end] = value.to_bytes(end - begin, "big", signed=value < 0)
    with pytest.raises(LtxError, match=problem):
        ltx.decode(bytes(data))


def test_pages_that_may_not_be_are_refused() -> None:
    """Out of order, twice, beyond the end, of another size, the lock page; a snapshot with a gap."""
    header = ltx.Header(page_size=65536, commit=20000, min_txid=5, max_txid=5)
    good = bytes(65536)
    for numbers in ((2, 1), (2, 2), (0,), (20001,), (ltx.lock_page(65536),)):
        with pytest.raises(ValueError, match="page"):
            ltx.encode(header, [ltx.Page(number, good) for number in numbers])
    with pytest.raises(ValueError, match="bytes"):
        ltx.encode(header, [ltx.Page(1, good[1:])])
    with pytest.raises(LtxError, match="snapshot"):
        ltx.encode(msgspec.structs.replace(header, min_txid=1, commit=2), [ltx.Page(1, good)])


def test_database_beyond_its_lock_page_streams_in_little_memory() -> None:
    """A snapshot of more than 1 GiB leaves out the page with the locks, and is never in memory as a whole."""
    assert [ltx.lock_page(size) for size in (512, 4096, 65536)] == [2097153, 262145, 16385]
    assert ltx.page_count(16384, 65536) == 16384
    assert ltx.page_count(16385, 65536) == 16384
    commit, zeros = 16390, bytes(65536)

    def pages() -> Iterator[ltx.Page]:
        return (ltx.Page(number, zeros) for number in range(1, commit + 1) if number != 16385)

    header = ltx.Header(page_size=65536, commit=commit, min_txid=1, max_txid=3)
    tracemalloc.start()
    file = io.BytesIO()
    for piece in ltx.encoded(header, pages()):
        file.write(piece)
    file.seek(0)
    _, found = ltx.open_pages(file)
    assert sum(1 for _ in found) == commit - 1
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    with pytest.raises(LtxError, match="snapshot"):
        ltx.encode(header, (page for page in pages() if page.number < commit))


def test_names_of_files() -> None:
    """16 hexadecimal digits each; nothing else is a name."""
    assert ltx.file_name(1, 255) == "0000000000000001-00000000000000ff.ltx"
    assert ltx.parse_file_name("0000000000000001-00000000000000ff.ltx") == (1, 255)
    for name in (
        "1-2.ltx",
        "0000000000000001-00000000000000FF.ltx",
        "0000000000000001-00000000000000ff.ltx.tmp",
    ):
        assert ltx.parse_file_name(name) is None


def test_full_file_is_known() -> None:
    """A file with every page says so, whatever its transactions are."""
    pages = [ltx.Page(number, bytes(512)) for number in (1, 2, 3)]
    header = ltx.Header(page_size=512, commit=3, min_txid=8, max_txid=8)
    assert ltx.decode(ltx.encode(header, pages)).is_full
    assert not ltx.decode(ltx.encode(header, pages[1:])).is_full
