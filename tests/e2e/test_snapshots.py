"""Snapshots of an app's database: made from a replica or a live database, restored at any position."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.site import LITESTREAM, Site, pieces
from tests.e2e.wal import connected, make_log

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.data import image_process, ltx, restoring
from phalanx.data.image_process import ImageSource
from phalanx.data.restoring import Wanted
from phalanx.data.snapshots import snapshot_name
from phalanx.decide.retention import Limits
from phalanx.errors import DatabaseError
from phalanx.testing.nats import NatsServer
from phalanx.types import Position


def start(*command: str) -> subprocess.Popen[bytes]:
    """A program that goes on until it is ended."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def run(*command: str, stdin: bytes) -> bytes:
    """What a program makes of its input."""
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=True).stdout


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture
async def make_site(tmp_path: Path, bus: NatsBus) -> AsyncIterator[Callable[..., AsyncGenerator[Site]]]:
    """Makes the site of a test."""
    sites: list[Site] = []

    async def make(page_size: int = 4096) -> Site:
        sites.append(Site(tmp_path, bus, await make_log(bus), page_size))
        await sites[0].begin(7)
        return sites[0]

    yield make  # pyright: ignore
    for site in sites:
        site.close()


@pytest.fixture
async def site(make_site: Callable[..., object]) -> Site:
    """A site with pages of 4096 bytes."""
    return await make_site()  # pyright: ignore


# --- positions


@pytest.mark.parametrize("page_size", [512, 65536])
async def test_g8_every_position_after_a_snapshot_is_restored_byte_for_byte(
    make_site: Callable[..., object], page_size: int
) -> None:
    """Rows, a VACUUM, a WAL begun anew, two reigns: each position is what Litestream restores."""
    site: Site = await make_site(page_size)  # pyright: ignore
    for number in range(4):
        await site.commit(rows=number * 10 + 1)
    made = await site.snapshots.create(site.source, epoch=7)
    assert (made.sequence, made.txid, made.node) == (site.sequence, 4, "n2")
    assert made.raw_bytes == len(site.expected(4))
    await site.commit("DELETE FROM t WHERE id % 2 = 0")
    await site.commit("VACUUM")
    site.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await site.commit(rows=30, size=3000)
    await site.begin(9)
    await site.commit(rows=1)
    for position in site.positions[3:]:
        assert await site.restore(sequence=position.sequence) == site.expected(position.txid), position
    assert await site.restore() == site.expected(site.txid)
    assert await site.restore(snapshot=made.name) == site.expected(4)


async def test_snapshot_says_what_it_is(site: Site) -> None:
    """All that a list shows, and a second scheduled one at the same position is not made again."""
    await site.commit()
    await site.snapshots.create(site.source, epoch=7)
    await site.commit(rows=50)
    progress: list[tuple[int, int]] = []
    made = await site.snapshots.create(
        site.source, epoch=7, kind="manual", note="before the move", progress=lambda *at: progress.append(at)
    )
    first, second = await site.snapshots.list_snapshots()
    assert second == made == await site.snapshots.newest() == await site.snapshots.find(made.name)
    assert (made.name, made.kind, made.note) == (snapshot_name(site.sequence), "manual", "before the move")
    assert made.position == site.positions[-1]
    assert (made.page_size, made.commit * 4096) == (4096, made.raw_bytes)
    assert 0 < made.size_bytes < made.raw_bytes
    now = time.time()
    assert now - 30 < first.time < made.time <= made.created + 1 < now + 2
    assert progress[-1] == (made.raw_bytes, made.raw_bytes)
    again = await site.snapshots.create(site.source, epoch=7)
    assert (again.kind, again.created) == ("manual", made.created)


async def test_state_at_a_time(site: Site) -> None:
    """A time between two commits gives the first of them; one before all that is there is refused."""
    times = [time.time()]
    for _ in range(3):
        await asyncio.sleep(0.02)
        await site.commit()
        if len(times) == 1:
            await site.snapshots.create(site.source)
        await asyncio.sleep(0.02)
        times.append(time.time())
    for txid in (1, 2, 3):
        assert await site.restore(time=times[txid]) == site.expected(txid)
    with pytest.raises(DatabaseError, match="before the oldest snapshot"):
        await site.restore(time=times[0])
    with pytest.raises(DatabaseError, match="in the future"):
        await site.restore(time=time.time() + 3600)


async def test_record_that_is_too_large_for_the_log_is_restored(site: Site) -> None:
    """A transaction of 3 MB lies in the object store."""
    await site.commit()
    await site.snapshots.create(site.source)
    await site.commit(rows=30, size=100_000)
    await site.commit()
    assert await site.restore() == site.expected(3)


# --- a consistent view


async def test_snapshot_of_a_replica_that_goes_on_has_one_position(site: Site) -> None:
    """While an image is being read, slowly, the replica applies more and checkpoints: it stays as it was."""
    await site.commit(rows=300, size=50_000)
    before = site.positions[-1]
    async with image_process.pack(site.source) as packing:
        taken = packing.head
        chunks = packing.chunks()
        got = [await anext(chunks), await anext(chunks)]
        for number in range(6):
            await site.commit(f"UPDATE t SET y = randomblob(50000) WHERE id % 6 = {number}")
            site.replica.checkpoint()
        got += [chunk async for chunk in chunks]
    assert Position(taken.sequence, taken.txid) == before
    target = site.folder / "unpacked.db"
    assert await image_process.unpack(pieces(b"".join(got)), target) == taken
    assert target.read_bytes() == site.expected(before.txid)
    assert (await site.snapshots.create(site.source)).position == site.positions[-1]
    assert await site.restore() == site.expected(site.txid)


async def test_snapshots_of_a_busy_replica_are_all_of_known_positions(site: Site) -> None:
    """Images taken while records are applied one after the other: each is exactly what its position says."""
    await site.commit(rows=200, size=5000)
    for _ in range(24):
        await site.commit("UPDATE t SET y = randomblob(3000) WHERE id % 10 = 3", apply=False)

    async def follow(positions: list[Position]) -> None:
        for position in positions:
            path = site.capture / ltx.file_name(position.txid, position.txid)
            await asyncio.to_thread(site.replica.apply, position.sequence, position.txid, path.read_bytes())
            if position.txid % 5 == 0:
                await asyncio.to_thread(site.replica.checkpoint)
            await asyncio.sleep(0.02)

    seen: set[int] = set()
    left = [one for one in site.positions if one > site.replica.position]
    for number in range(3):
        following = asyncio.create_task(follow(left[8 * number : 8 * number + 8]))
        while not following.done():
            target = site.folder / f"busy-{time.monotonic_ns()}.db"
            async with image_process.pack(site.source) as packing:
                await image_process.unpack(packing.chunks(), target)
                seen.add(packing.head.txid)
                assert target.read_bytes() == site.expected(packing.head.txid)
        await following
    assert len(seen) >= 3


async def test_snapshot_of_a_live_database_under_load_has_one_position(site: Site, tmp_path: Path) -> None:
    """A program commits without a pause while Litestream captures: the image is of one captured transaction,
    and the log goes on from it."""
    await site.commit(rows=100, size=2000)
    writer = start(sys.executable, "-c", WRITER, str(site.live))
    capture = tmp_path / "capture.yml"
    capture.write_text(
        f"dbs:\n  - path: {site.live}\n    monitor-interval: 5ms\n    replica:\n      path: {site.second}\n"
    )
    litestreaming = start(LITESTREAM, "replicate", "-config", str(capture))

    async def ship() -> None:
        while True:
            for path in sorted(site.capture.iterdir()):
                txids = ltx.parse_file_name(path.name)
                if txids is not None and txids[1] > site.txid:
                    await site.ship(path, txids[1], apply=False)
            await asyncio.sleep(0.01)

    shipping = asyncio.create_task(ship())
    try:
        while site.txid < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        made = await site.snapshots.create(ImageSource(site.live, capture=site.capture), epoch=7)
        while site.txid < made.txid + 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    finally:
        writer.kill()
        writer.wait()
        shipping.cancel()
        await asyncio.gather(shipping, return_exceptions=True)
        litestreaming.terminate()
        litestreaming.wait()
    assert made.position in site.positions
    assert await site.restore(snapshot=made.name) == site.expected(made.txid)
    later = next(one for one in site.positions if one.txid == made.txid + 15)
    assert await site.restore(sequence=later.sequence) == site.expected(later.txid)


WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
database.execute("PRAGMA synchronous = OFF")
database.execute("PRAGMA wal_autocheckpoint = 0")
number = 0
while True:
    number += 1
    database.execute("UPDATE t SET y = randomblob(1500) WHERE id = ?", (number % 100,))
"""


# --- without Phalanx


@pytest.mark.skipif(shutil.which("lz4") is None, reason="no lz4 command")
async def test_snapshot_is_an_lz4_file(site: Site) -> None:
    """`lz4 -d` makes the database of what lies in the object store."""
    await site.commit(rows=100, size=60_000)
    made = await site.snapshots.create(site.source)
    data = b"".join([chunk async for chunk in site.snapshots.image(made)])
    assert run("lz4", "-dc", stdin=data) == site.expected(site.txid)


# --- what goes wrong


async def test_wanted_states_that_are_not_to_be_had_are_refused(site: Site) -> None:
    """No snapshot at all, a name, a position before the oldest one, beyond the log, in a purged part."""
    with pytest.raises(DatabaseError, match="has no snapshot"):
        await site.restore()
    await site.commit(rows=40)
    await site.commit()
    await site.log.purge(2)
    with pytest.raises(DatabaseError, match="has no snapshot"):
        await site.restore()
    first = await site.snapshots.create(site.source)
    for _ in range(3):
        await site.commit()
    with pytest.raises(DatabaseError, match="no snapshot 'x'"):
        await site.restore(snapshot="x")
    with pytest.raises(DatabaseError, match="position 2 is before the oldest snapshot"):
        await site.restore(sequence=site.positions[0].sequence)
    with pytest.raises(DatabaseError, match="is before the oldest snapshot"):
        await site.restore(time=first.time - 0.001)
    with pytest.raises(DatabaseError, match="ends at 6: there is no position 99"):
        await site.restore(sequence=99)
    await site.log.purge(first.sequence + 1)
    with pytest.raises(DatabaseError, match=r"begins at .* is gone"):
        await site.restore()
    assert await site.restore(snapshot=first.name) == site.expected(2)
    with pytest.raises(ValueError, match="at most one"):
        Wanted(sequence=3, time=1.0)


async def test_g8_log_that_begins_with_the_whole_database_is_enough(site: Site) -> None:
    """Before the oldest snapshot, or without any: each position and time that the log still leads to."""
    times: list[float] = []
    for rows in (3, 40, 3):
        await site.commit(rows=rows)
        await asyncio.sleep(0.02)
        times.append(time.time())
        await asyncio.sleep(0.02)
    assert await site.restore() == site.expected(3)
    await site.snapshots.create(site.source)
    for position, moment in zip(site.positions, times, strict=True):
        assert await site.restore(sequence=position.sequence) == site.expected(position.txid)
        assert await site.restore(time=moment) == site.expected(position.txid)
    with pytest.raises(DatabaseError, match="position 1 is before the oldest snapshot"):
        await site.restore(sequence=1)


async def test_log_that_begins_with_a_later_record_of_every_page_is_enough(site: Site) -> None:
    """What was before a record that holds every page is not needed for what is after it."""
    await site.commit()
    whole = site.expected(1)
    pages = [ltx.Page(at // 4096 + 1, whole[at : at + 4096]) for at in range(0, len(whole), 4096)]
    full = site.folder / "full.ltx"
    full.write_bytes(ltx.encode(ltx.Header(page_size=4096, commit=len(pages), min_txid=2, max_txid=2), pages))
    await site.ship(full, 2, apply=False)
    part = site.folder / "part.ltx"
    part.write_bytes(
        ltx.encode(ltx.Header(page_size=4096, commit=len(pages), min_txid=3, max_txid=3), pages[1:])
    )
    await site.ship(part, 3, apply=False)
    await site.ship(part, 3, apply=False)
    first, second, third, _ = (position.sequence for position in site.positions)
    await site.log.purge(first)
    assert await site.restore(sequence=second) == whole
    assert await site.restore(sequence=third) == whole
    await site.log.purge(second)
    with pytest.raises(DatabaseError, match="has no snapshot"):
        await site.restore(sequence=third)


async def test_record_that_does_not_go_on_is_an_error(site: Site) -> None:
    """Transactions are missing in the log: nothing is restored from there on."""
    await site.commit()
    await site.snapshots.create(site.source)
    for _ in range(3):
        await site.commit()
    files = sorted(site.capture.iterdir())
    data = ltx.decode(files[-1].read_bytes())
    skipping = site.folder / "skipping.ltx"
    skipping.write_bytes(
        ltx.encode(ltx.Header(page_size=4096, commit=20, min_txid=9, max_txid=9), data.pages)
    )
    await site.ship(skipping, 9, apply=False)
    with pytest.raises(DatabaseError, match="after transaction 4 comes 9: some are missing"):
        await site.restore()
    assert await site.restore(sequence=site.sequence - 1) == site.expected(4)


def fill(path: Path, data: bytes = b"mine") -> Path:
    """A file that is there already."""
    path.write_bytes(data)
    return path


async def test_restore_never_touches_what_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that exists, a log beside it, no folder, no room: refused before anything is written."""
    await site.commit()
    await site.snapshots.create(site.source)
    target = site.folder / "target.db"
    for suffix in ("", "-wal", "-shm", "-journal"):
        there = fill(target.with_name(target.name + suffix))
        with pytest.raises(DatabaseError, match=f"{there} exists"):
            await site.restoring.restore(Wanted(), target)
        os.unlink(there)
    with pytest.raises(DatabaseError, match="there is no folder"):
        await site.restoring.restore(Wanted(), site.folder / "nowhere" / "target.db")
    monkeypatch.setattr(restoring, "_MARGIN_BYTES", 1 << 60)
    with pytest.raises(DatabaseError, match="MiB free"):
        await site.restoring.restore(Wanted(), target)
    assert not target.exists()
    assert not (site.folder / ".target.db-restoring").exists()


async def test_target_that_appears_meanwhile_stays(site: Site) -> None:
    """Somebody makes a file of that name while the restore runs: theirs stays, ours is gone."""
    await site.commit()
    await site.snapshots.create(site.source)
    target = site.folder / "target.db"
    with pytest.raises(DatabaseError, match="exists"):
        await site.restoring.restore(Wanted(), target, lambda *_: fill(target, b"theirs") and None)
    assert target.read_bytes() == b"theirs"
    assert not (site.folder / ".target.db-restoring").exists()


async def test_g8_restore_that_is_cancelled_or_killed_leaves_nothing(site: Site) -> None:
    """Cancelled at many moments, or with its process killed: no file; a left-over folder is cleared away."""
    await site.commit(rows=100, size=60_000)
    await site.snapshots.create(site.source)
    await site.commit()
    target = site.folder / "target.db"
    for milliseconds in (1, 20, 60, 100, 140, 180, 220):
        task = asyncio.create_task(site.restoring.restore(Wanted(), target))
        await asyncio.wait({task}, timeout=milliseconds / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not target.exists():
            assert not (site.folder / ".target.db-restoring").exists()
        target.unlink(missing_ok=True)
        assert not children("phalanx.data.images")
    task = asyncio.create_task(site.restoring.restore(Wanted(), target))
    async with asyncio.timeout(10):
        while not (found := children("phalanx.data.images")):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    os.kill(found[0], signal.SIGKILL)
    with pytest.raises(DatabaseError, match="killed by SIGKILL"):
        await task
    left = site.folder / ".target.db-restoring"
    assert not target.exists()
    assert not left.exists()
    left.mkdir()
    (left / "database").write_bytes(b"left over")
    await site.restoring.restore(Wanted(), target)
    assert target.read_bytes() == site.expected(site.txid)
    assert not left.exists()


def children(of: str) -> list[int]:
    """Processes of ours that run that module."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            status = (path.parent / "stat").read_text().rpartition(")")[2].split()
            if of.encode() in path.read_bytes() and int(status[1]) == os.getpid() and status[0] != "Z":
                found.append(int(path.parent.name))
    return found


async def test_damaged_snapshot_is_seen(site: Site, bus: NatsBus) -> None:
    """One byte of what is stored is another one: neither verified nor restored, and no file is left."""
    await site.commit(rows=30)
    made = await site.snapshots.create(site.source)
    assert await site.snapshots.verify(made.name) == made
    data = bytearray(b"".join([chunk async for chunk in site.snapshots.image(made)]))
    data[len(data) // 2] ^= 1
    info = await site.snapshots.objects.info(made.name)
    assert info is not None
    await site.snapshots.objects.put(made.name, pieces(bytes(data)), info.metadata)
    with pytest.raises(DatabaseError, match="damaged"):
        await site.snapshots.verify(made.name)
    with pytest.raises(DatabaseError, match="damaged"):
        await site.restore()


async def test_snapshot_of_a_damaged_database_does_not_verify(site: Site) -> None:
    """What SQLite's check finds is an error, although every checksum is right."""
    await site.commit(rows=30)
    await site.commit(rows=30)
    file = ltx.decode(sorted(site.capture.iterdir())[-1].read_bytes())
    bad = ltx.Page(3, b"\x0d" + bytes(4095))
    header = ltx.Header(page_size=4096, commit=file.header.commit, min_txid=3, max_txid=3)
    path = site.folder / "bad.ltx"
    path.write_bytes(ltx.encode(header, [bad]))
    await site.ship(path, 3)
    made = await site.snapshots.create(site.source)
    with pytest.raises(DatabaseError, match="the database is damaged"):
        await site.snapshots.verify(made.name)
    with pytest.raises(DatabaseError, match="the database is damaged"):
        await site.restore()


async def test_source_without_a_position_gives_no_snapshot(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that does not know the state, a database that is not there: an error, and no object."""
    await site.commit()
    source = site.source
    assert source.journal is not None
    journal = source.journal.read_bytes()
    source.journal.write_bytes(b"")
    begun = time.monotonic()
    with pytest.raises(DatabaseError, match="which position"):
        await site.snapshots.create(source)
    assert time.monotonic() - begun < 20
    source.journal.write_bytes(journal)
    with pytest.raises(DatabaseError, match="unable to open"):
        await site.snapshots.create(ImageSource(site.folder / "none.db", journal=source.journal))
    assert await site.snapshots.list_snapshots() == []


# --- what may go


async def test_last_snapshot_is_not_deleted(site: Site) -> None:
    """Of two each one can be deleted, the other one then stays."""
    await site.commit()
    first = await site.snapshots.create(site.source)
    with pytest.raises(DatabaseError, match="is the last snapshot"):
        await site.snapshots.delete(first.name)
    await site.commit()
    second = await site.snapshots.create(site.source)
    with pytest.raises(DatabaseError, match="no snapshot 'x'"):
        await site.snapshots.delete("x")
    await site.snapshots.delete(first.name)
    assert [one.name for one in await site.snapshots.list_snapshots()] == [second.name]


async def test_old_snapshots_and_their_part_of_the_log_go(site: Site) -> None:
    """Three snapshots of two: one goes, and the log up to the next one; every later state is still there."""
    for _ in range(3):
        await site.commit()
        await site.snapshots.create(site.source)
    await site.commit()
    kept = await site.snapshots.list_snapshots()
    nothing = await site.snapshots.tidy(Limits(2, 3600.0))
    assert (nothing.snapshots, nothing.entries) == ((), 0)
    tidied = await site.snapshots.tidy(Limits(2, 3600.0, grace_seconds=0.0))
    assert tidied.snapshots == (kept[0].name,)
    assert tidied.entries == kept[1].sequence
    assert [one.name for one in await site.snapshots.list_snapshots()] == [one.name for one in kept[1:]]
    for position in site.positions[1:]:
        assert await site.restore(sequence=position.sequence) == site.expected(position.txid)


async def test_clock_that_is_days_ahead_removes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are told by NATS's clock, which has stamped the snapshots."""
    for _ in range(2):
        await site.commit()
        await site.snapshots.create(site.source)
    now = system.wall() + 30 * 86400.0
    monkeypatch.setattr(system, "wall", lambda: now)
    tidied = await site.snapshots.tidy(Limits(24, 7 * 86400.0))
    assert (tidied.snapshots, tidied.entries) == ((), 0)


async def test_newest_snapshot_is_found_by_one_look_into_the_log(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: each status of a node says which one it is."""
    for _ in range(5):
        await site.commit()
        made = await site.snapshots.create(site.source)
    looks, read = 0, site.log.read

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return await read(*arguments, **options)

    monkeypatch.setattr(site.log, "read", counted)
    assert await site.snapshots.newest() == made
    assert looks == 1
    assert len(await site.snapshots.list_usable()) == 5


async def test_snapshot_of_what_the_log_has_lost_counts_for_nothing(site: Site) -> None:
    """Its place in the log is taken by another entry, or beyond the end: not restored unless by its name, no
    reason to delete others or to purge the log, and it goes with its age."""
    await site.commit()
    good = await site.snapshots.create(site.source)
    await site.commit()
    lost = await site.snapshots.create(site.source)
    info = await site.snapshots.objects.info(lost.name)
    assert info is not None
    stream = b"".join([chunk async for chunk in site.snapshots.image(lost)])
    changed = {**info.metadata, "nonce": "another"}
    await site.snapshots.objects.put(lost.name, pieces(stream), changed)
    beyond = {**info.metadata, "sequence": "999"}
    await site.snapshots.objects.put(snapshot_name(999), pieces(stream), beyond)
    await site.commit()
    assert await site.snapshots.newest() == good
    assert await site.restore() == site.expected(3)
    assert await site.restore(snapshot=lost.name) == site.expected(2)
    with pytest.raises(DatabaseError, match="is the last snapshot"):
        await site.snapshots.delete(good.name)
    tidied = await site.snapshots.tidy(Limits(1, 3600.0, grace_seconds=0.0))
    assert (tidied.snapshots, tidied.entries) == ((), good.sequence)
    assert await site.restore() == site.expected(3)
    tidied = await site.snapshots.tidy(Limits(1, 0.0, grace_seconds=0.0))
    assert tidied.snapshots == (lost.name, snapshot_name(999))
    assert await site.restore() == site.expected(3)


async def test_restore_without_a_snapshot_of_this_log_says_so(site: Site) -> None:
    """The only snapshot is of what the log has lost, and the log's beginning is gone."""
    await site.commit(rows=40)
    await site.commit()
    lost = await site.snapshots.create(site.source)
    info = await site.snapshots.objects.info(lost.name)
    assert info is not None
    stream = b"".join([chunk async for chunk in site.snapshots.image(lost)])
    await site.snapshots.objects.put(lost.name, pieces(stream), {**info.metadata, "nonce": "another"})
    assert await site.restore() == site.expected(2)
    await site.log.purge(2)
    with pytest.raises(DatabaseError, match="does not go on from any snapshot up to 3"):
        await site.restore()


async def test_g8_snapshot_that_is_cancelled_leaves_nothing(site: Site) -> None:
    """Cancelled at many moments: no object or a whole one, and no process."""
    await site.commit(rows=100, size=60_000)
    for milliseconds in (1, 30, 60, 90, 120, 150, 200):
        task = asyncio.create_task(site.snapshots.create(site.source, kind="manual"))
        await asyncio.wait({task}, timeout=milliseconds / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not children("phalanx.data.images")
        for one in await site.snapshots.list_snapshots():
            assert await site.restore(snapshot=one.name) == site.expected(one.txid)
    await site.snapshots.create(site.source)
    assert await site.restore() == site.expected(site.txid)
