"""The second copy of an app's database, which Litestream restores without Phalanx."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.e2e.site import Site, litestream
from tests.e2e.wal import NAMES, connected, make_log

from phalanx.bus.connection import NatsBus
from phalanx.data.copy_folder import CopyFolder
from phalanx.data.log import WalLog
from phalanx.data.second_copy import BASES, RECORDS, Copied, SecondCopy
from phalanx.data.snapshots import Snapshots
from phalanx.errors import DatabaseError
from phalanx.testing.nats import NatsServer
from phalanx.types import Position


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture(params=[4096])
async def site(request: pytest.FixtureRequest, tmp_path: Path, bus: NatsBus) -> AsyncIterator[Site]:
    """A site in its first reign."""
    with closing(Site(tmp_path, bus, await make_log(bus), request.param)) as made:
        await made.begin(7)
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the copy goes."""
    return tmp_path / "copy"


@pytest.fixture
def copy(site: Site, folder: Path) -> SecondCopy:
    """The copy of the site."""
    return SecondCopy(CopyFolder(folder), site.snapshots, NAMES.platform)


def restored(folder: Path, *options: str) -> bytes:
    """What plain Litestream restores from the copy."""
    target = folder.parent / "from-copy.db"
    target.unlink(missing_ok=True)
    litestream("restore", *options, "-o", str(target), f"file://{folder}")
    return target.read_bytes()


def names(folder: Path, level: int) -> list[str]:
    """The files of one level."""
    return sorted(path.name for path in (folder / "ltx" / str(level)).glob("*"))


@pytest.mark.parametrize("site", [512, 65536], indirect=True)
async def test_litestream_restores_every_position_of_the_copy(
    site: Site, copy: SecondCopy, folder: Path
) -> None:
    """From the beginning of the log, a base in the middle, a record too large for the log, another reign: the
    newest state and each one before, byte for byte."""
    await site.commit()
    assert (await copy.update()).records == 1
    assert restored(folder) == site.expected(1)
    await site.commit(rows=40)
    await site.snapshots.create(site.source)
    await site.commit()
    updated = await copy.update()
    assert (updated.position, updated.records, updated.bases) == (site.positions[-1], 2, 1)
    await site.commit(rows=30, size=60_000)
    await site.begin(9)
    await site.commit("VACUUM")
    updated = await copy.update()
    assert (updated.position.txid, updated.bases, updated.waits_for) == (site.txid, 0, "")
    assert restored(folder) == site.expected(site.txid)
    for position in site.positions:
        assert restored(folder, "-txid", f"{position.txid:016x}") == site.expected(position.txid)
    assert await copy.update() == type(updated)(Position(site.sequence, site.txid))


async def test_time_in_the_copy_is_that_of_the_commits(site: Site, copy: SecondCopy, folder: Path) -> None:
    """Litestream restores to a time, although all was copied much later."""
    await site.commit()
    await site.snapshots.create(site.source)
    times: list[datetime] = []
    for _ in range(3):
        await asyncio.sleep(0.05)
        await site.commit()
        await asyncio.sleep(0.05)
        times.append(datetime.now(UTC))
    await copy.update()
    for time, position in zip(times[:-1], site.positions[1:], strict=False):
        text = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        assert restored(folder, "-timestamp", text) == site.expected(position.txid)


async def test_new_snapshots_become_bases_and_old_ones_go(site: Site, copy: SecondCopy, folder: Path) -> None:
    """Each update takes the newest snapshot; two bases are kept, and the records after the older one."""
    for _ in range(4):
        await site.commit()
        await site.commit()
        await site.snapshots.create(site.source)
        await copy.update()
    await site.commit()
    await copy.update()
    assert len(names(folder, BASES)) == 4
    assert await copy.tidy(2) == 2 + 6
    assert len(names(folder, BASES)) == 2
    for txid in range(6, 10):
        assert restored(folder, "-txid", f"{txid:016x}") == site.expected(txid)
    assert await copy.tidy(2) == 0


async def test_copy_that_fell_behind_the_log_begins_anew(site: Site, copy: SecondCopy, folder: Path) -> None:
    """The log was purged beyond the copy: the newest snapshot becomes a base, the newest state is there."""
    await site.commit()
    await site.snapshots.create(site.source)
    await copy.update()
    for _ in range(3):
        await site.commit()
    await site.snapshots.create(site.source)
    await site.commit()
    await site.log.purge(site.sequence - 1)
    updated = await copy.update()
    assert (updated.position.txid, updated.records, updated.bases) == (5, 1, 1)
    assert restored(folder) == site.expected(5)


class Failing(CopyFolder):
    """A folder whose operation number *at* fails, before or after it was done."""

    def __init__(self, folder: Path, at: int, *, done: bool) -> None:
        super().__init__(folder)
        self._left, self._done = at, done

    async def _fail(self, *, done: bool) -> None:
        if done == self._done:
            self._left -= 1
            if self._left == 0:
                raise OSError("the disk is gone")

    async def write(self, file: Copied, chunks: AsyncIterable[bytes], time: float) -> None:
        await self._fail(done=False)
        await super().write(file, chunks, time)
        await self._fail(done=True)

    async def delete(self, file: Copied) -> None:
        await self._fail(done=False)
        await super().delete(file)
        await self._fail(done=True)

    async def write_note(self, data: bytes) -> None:
        await self._fail(done=False)
        await super().write_note(data)
        await self._fail(done=True)


@asynccontextmanager
async def after_a_loss(site: Site, bus: NatsBus) -> AsyncGenerator[Site]:
    """The site as it is after NATS lost all acknowledged writes, and another reign began with other data."""
    for stream in (NAMES.wal_stream("wiki"), NAMES.object_stream(NAMES.snapshots_bucket("wiki"))):
        await bus.api(f"STREAM.DELETE.{stream}", {})
    folder = site.folder / "other"
    await asyncio.to_thread(folder.mkdir)
    with closing(Site(folder, bus, await make_log(bus), 4096)) as other:
        await other.begin(7)
        await other.commit(rows=1)
        yield other


@pytest.mark.parametrize("commits", [1, 9])
async def test_log_that_lost_writes_is_followed(
    site: Site, copy: SecondCopy, folder: Path, bus: NatsBus, commits: int
) -> None:
    """NATS lost acknowledged records, which the copy has; another reign used their numbers for others, fewer
    or more of them. None of the lost ones is applied to what follows."""
    await site.commit()
    await site.snapshots.create(site.source)
    for _ in range(4):
        await site.commit()
    await copy.update()
    assert len(names(folder, RECORDS)) == 5
    async with after_a_loss(site, bus) as other:
        again = SecondCopy(CopyFolder(folder), other.snapshots, NAMES.platform)
        for _ in range(commits):
            await other.commit(rows=1)
        assert (await again.update()).waits_for == "a snapshot"
        assert restored(folder) == site.expected(5)
        await other.snapshots.create(other.source)
        await other.commit(rows=1)
        updated = await again.update()
        assert (updated.position.txid, updated.bases) == (other.txid, 1)
        assert restored(folder) == other.expected(other.txid)
        for _ in range(3):
            await other.commit(rows=1)
            await again.update()
            assert restored(folder) == other.expected(other.txid)


async def test_g8_interrupted_new_beginning_leaves_a_copy_that_can_be_restored(
    site: Site, copy: SecondCopy, folder: Path, bus: NatsBus
) -> None:
    """A copy that has to begin anew after a loss is interrupted at each operation: it holds a state of before
    or of after, and the next update goes on."""
    await site.commit()
    await site.snapshots.create(site.source)
    for _ in range(4):
        await site.commit()
    await copy.update()
    before = await asyncio.to_thread(folder.rename, site.folder / "before")
    async with after_a_loss(site, bus) as other:
        await other.commit(rows=1)
        await other.snapshots.create(other.source)
        await other.commit(rows=1)
        states = [site.expected(txid) for txid in range(1, 6)] + [other.expected(txid) for txid in (2, 3)]
        for at in range(1, 9):
            await asyncio.to_thread(shutil.copytree, before, folder)
            failing = Failing(folder, at, done=True)
            with contextlib.suppress(OSError):
                await SecondCopy(failing, other.snapshots, NAMES.platform).update()
            assert restored(folder) in states, at
            await SecondCopy(CopyFolder(folder), other.snapshots, NAMES.platform).update()
            assert restored(folder) == states[-1]
            await asyncio.to_thread(shutil.rmtree, folder)


@pytest.mark.parametrize("done", [False, True])
async def test_g8_interrupted_update_leaves_a_copy_that_can_be_restored(
    site: Site, folder: Path, done: bool
) -> None:
    """Whichever operation is the last one: what is there is a state of the database, and the next update
    goes on."""
    await site.commit()
    await site.snapshots.create(site.source)
    await site.commit()
    await site.commit()
    await site.snapshots.create(site.source)
    await site.commit()
    for at in range(1, 12):
        copy = SecondCopy(Failing(folder, at, done=done), site.snapshots, NAMES.platform)
        try:
            await copy.update()
        except OSError:
            if names(folder, BASES) or names(folder, RECORDS):
                assert restored(folder) in [site.expected(txid) for txid in range(1, site.txid + 1)]
        assert not [name for level in (BASES, RECORDS) for name in names(folder, level) if "tmp" in name]
        await SecondCopy(CopyFolder(folder), site.snapshots, NAMES.platform).update()
        assert restored(folder) == site.expected(site.txid)
        await site.commit()


async def test_destination_with_something_else_is_refused(
    site: Site, copy: SecondCopy, folder: Path, bus: NatsBus
) -> None:
    """Litestream's own replica, another app's copy, a damaged note: nothing there is touched."""
    await site.commit()
    await site.snapshots.create(site.source)
    own = SecondCopy(CopyFolder(site.second), site.snapshots, NAMES.platform)
    with pytest.raises(DatabaseError, match="did not make"):
        await own.update()
    await copy.update()
    other = Snapshots(site.snapshots.objects, WalLog(bus, NAMES, "wiki"), "shop")
    with pytest.raises(DatabaseError, match="'wiki' of platform 'prod'"):
        await SecondCopy(CopyFolder(folder), other, NAMES.platform).update()
    await CopyFolder(folder).write_note(b"{")
    with pytest.raises(DatabaseError, match="damaged"):
        await copy.update()
    assert restored(folder) == site.expected(1)


async def test_damaged_snapshot_is_no_base(site: Site, copy: SecondCopy, folder: Path) -> None:
    """An object whose content is not what was packed: an error, and no file."""
    await site.commit(rows=30)
    made = await site.snapshots.create(site.source)
    info = await site.snapshots.objects.info(made.name)
    assert info is not None
    data = bytearray(b"".join([chunk async for chunk in site.snapshots.image(made)]))
    data[len(data) // 2] ^= 1

    async def damaged() -> AsyncIterator[bytes]:
        yield bytes(data)

    await site.snapshots.objects.put(made.name, damaged(), info.metadata)
    with pytest.raises(DatabaseError, match="damaged"):
        await copy.update()
    assert names(folder, BASES) == []
