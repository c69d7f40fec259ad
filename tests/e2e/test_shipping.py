"""Shipping of captured transactions into the log, on real servers."""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.wal import APP, NAMES, STREAM, Folder, connected, ltx_file, make_log
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.data import ltx
from phalanx.data.entries import LogRecord, Seal, SealKind
from phalanx.data.log import WalLog
from phalanx.data.shipping import Shipper, count_commits
from phalanx.errors import DatabaseError, Fenced, PhalanxError
from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.types import Position


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture
async def log(bus: NatsBus) -> WalLog:
    return await make_log(bus)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "ltx")


@asynccontextmanager
async def shipping(log: WalLog, folder: Folder, epoch: int = 3, **more: Any) -> AsyncGenerator[Shipper]:
    """A shipper with a reign of its own, that is stopped at the end."""
    ended: list[PhalanxError] = more.pop("ended", [])
    sealed = await log.seal(epoch, "n1", SealKind.OPEN)
    shipper = Shipper(
        log,
        folder,
        epoch=epoch,
        node="n1",
        base=Position(sealed.sequence, sealed.txid),
        on_fenced=ended.append,
        **more,
    )
    await shipper.start()
    try:
        yield shipper
    finally:
        await shipper.stop()


async def stored(log: WalLog) -> list[int]:
    """The transactions in the log, in order."""
    txids: list[int] = []
    start = 1
    while page := await log.read(start):
        txids += [entry.txid for entry in page if isinstance(entry, LogRecord)]
        start = page[-1].sequence + 1
    return txids


@pytest.mark.parametrize("forgets", [True, False])
async def test_captured_files_go_into_the_log_and_the_newest_stays(
    log: WalLog, folder: Folder, forgets: bool
) -> None:
    """What is there at the start and what comes is shipped in order; only the newest file is kept."""
    for _ in range(5):
        folder.add()
    shipped: list[Position] = []
    forget = folder.forget if forgets else None
    async with shipping(log, folder, on_shipped=shipped.append, forget=forget) as shipper:
        assert await shipper.wait_shipped(5, 5) == Position(6, 5)
        for _ in range(5):
            shipper.captured(folder.add())
        await shipper.wait_shipped(10, 5)
        await until(lambda: len(folder.files(0)) == 1)
        assert [file.txid for file in folder.files(0)] == [10]
        await until(lambda: shipper.backlog().files == 0)
    assert await stored(log) == list(range(1, 11))
    assert [position.txid for position in shipped] == list(range(1, 11))


async def test_files_that_an_earlier_reign_has_shipped_are_removed(log: WalLog, folder: Folder) -> None:
    """A node that is active again ships what is new, and removes what its last reign left behind."""
    for _ in range(3):
        folder.add()
    async with shipping(log, folder, epoch=3) as shipper:
        await shipper.wait_shipped(3, 5)
    for txid in (1, 2):
        folder.add(txid=txid)
    folder.add(txid=4)
    async with shipping(log, folder, epoch=4) as shipper:
        await shipper.wait_shipped(4, 5)
        await until(lambda: [file.txid for file in folder.files(0)] == [4])
    assert await stored(log) == [1, 2, 3, 4]


async def test_file_that_nobody_tells_of_is_found(
    log: WalLog, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured file is shipped although the event for it was lost."""
    monkeypatch.setattr("phalanx.data.shipping.LOOK_SECONDS", 0.05)
    async with shipping(log, folder) as shipper:
        await shipper.wait_shipped(0, 20)
        await asyncio.sleep(0)
        folder.add()
        await shipper.wait_shipped(1, 5)


async def test_file_that_cannot_be_removed_holds_nothing_up(log: WalLog, folder: Folder) -> None:
    """Files that stay although they are in the log (a disk became read-only) are not shipped again."""

    def refuse(txid: int) -> None:
        raise PermissionError(f"{txid} stays")

    async with shipping(log, folder, forget=refuse) as shipper:
        for _ in range(3):
            shipper.captured(folder.add())
        await shipper.wait_shipped(3, 5)
    assert await stored(log) == [1, 2, 3]
    assert len(folder.files(0)) == 3


async def test_wait_for_what_is_not_captured_times_out(log: WalLog, folder: Folder) -> None:
    """Who waits for a transaction that never comes is told at the deadline."""
    async with shipping(log, folder) as shipper:
        with pytest.raises(TimeoutError):
            await shipper.wait_shipped(1, 0.05)


async def test_g2_shipper_ends_when_another_epoch_seals(log: WalLog, bus: NatsBus, folder: Folder) -> None:
    """A newer seal ends it for good: callback, everybody who waits, and no file is lost or shipped."""
    ended: list[PhalanxError] = []
    async with shipping(log, folder, ended=ended) as shipper:
        shipper.captured(folder.add())
        await shipper.wait_shipped(1, 5)
        await WalLog(bus, NAMES, APP).seal(4, "n2", SealKind.OPEN)
        shipper.captured(folder.add())
        with pytest.raises(Fenced):
            await shipper.wait_shipped(2, 5)
        await until(lambda: ended)
        assert isinstance(shipper.trouble, Fenced)
    assert isinstance(ended[0], Fenced)
    assert await stored(log) == [1]
    assert [file.txid for file in folder.files(1)] == [2]


async def test_g2_backlog_of_a_deposed_leader_does_not_keep_a_new_seal_out(
    log: WalLog, bus: NatsBus, folder: Folder
) -> None:
    """An old leader that ships a long backlog at full speed is stopped by a new seal within a moment."""
    for _ in range(3000):
        folder.add()
    ended: list[PhalanxError] = []
    async with shipping(log, folder, ended=ended) as shipper:
        await shipper.wait_shipped(10, 20)
        sealed = await WalLog(bus, NAMES, APP).seal(4, "n2", SealKind.OPEN, timeout=20)
        await until(lambda: ended)
    assert isinstance(ended[0], Fenced)
    found = await stored(log)
    assert found == list(range(1, sealed.txid + 1))
    assert len(found) < 3000
    assert (await log.last()).sequence == sealed.sequence


async def test_missing_file_ends_the_shipper(log: WalLog, folder: Folder) -> None:
    """A gap between captured transactions is never shipped over."""
    ended: list[PhalanxError] = []
    async with shipping(log, folder, ended=ended) as shipper:
        folder.add()
        folder.add(txid=3)
        shipper.captured()
        await until(lambda: ended)
    assert "transaction 2 is missing" in str(ended[0])
    assert await stored(log) == [1]


async def test_damaged_file_ends_the_shipper(log: WalLog, folder: Folder) -> None:
    """A file whose header is none, or is of another transaction, is not shipped."""
    for content in (b"nothing", ltx_file(7)):
        ended: list[PhalanxError] = []
        folder.last = 0
        folder.add(content)
        async with shipping(log, folder, ended=ended) as shipper:
            shipper.captured()
            await until(lambda: ended)  # noqa: B023
        assert isinstance(ended[0], DatabaseError)
    assert await stored(log) == []


async def test_g9_backlog_of_an_outage_is_shipped_in_order(
    log: WalLog, folder: Folder, nats_server: NatsServer
) -> None:
    """NATS is away: the backlog is known and grows, and goes into the log in order when it is back."""
    backlogs: list[int] = []
    async with shipping(log, folder, on_backlog=backlogs.append) as shipper:
        shipper.captured(folder.add())
        await shipper.wait_shipped(1, 5)
        nats_server.kill()
        size = 0
        for _ in range(30):
            txid = folder.add()
            size += len(ltx_file(txid))
            shipper.captured(txid)
        await until(lambda: shipper.backlog().files == 30)
        assert shipper.backlog().bytes == size
        await until(lambda: shipper.failing)
        nats_server.start()
        await shipper.wait_shipped(31, 20)
        await until(lambda: backlogs[-1] == 0)
        assert max(backlogs) == size
        assert shipper.failing == ""
    async with connected(nats_server.url()) as bus:
        assert await stored(WalLog(bus, NAMES, APP)) == list(range(1, 32))


async def test_connection_that_breaks_again_and_again(
    log: WalLog, folder: Folder, nats_server: NatsServer
) -> None:
    """A connection that breaks while records are shipped loses none, and stores none twice."""
    async with (
        TcpProxy("127.0.0.1", nats_server.port()) as link,
        connected(link.url, ping_interval=0.2) as far,
        shipping(WalLog(far, NAMES, APP), folder) as shipper,
    ):
        for round_ in range(5):
            for _ in range(20):
                shipper.captured(folder.add())
            await shipper.wait_shipped(folder.last - 10, 20)
            link.black_hole() if round_ == 2 else link.cut()
            for _ in range(20):
                shipper.captured(folder.add())
            await asyncio.sleep(0.05)
            link.heal()
        await shipper.wait_shipped(folder.last, 20)
    assert await stored(log) == list(range(1, 201))


async def test_oversized_transaction_goes_by_way_of_the_object_store(log: WalLog, folder: Folder) -> None:
    """A transaction larger than a message keeps its place in the log."""
    big = ltx_file(2, 5_000_000)
    folder.add()
    folder.add(big)
    folder.add()
    async with shipping(log, folder) as shipper:
        assert await shipper.wait_shipped(3, 10) == Position(4, 3)
    record = (await log.read(3))[0]
    assert isinstance(record, LogRecord)
    assert record.pointer is not None
    assert b"".join([chunk async for chunk in log.objects.get(record.pointer.name)]) == big


async def test_graceful_end_closes_the_log(log: WalLog, folder: Folder) -> None:
    """The closing seal says that nothing is missing, and is the last thing of the reign."""
    async with shipping(log, folder) as shipper:
        shipper.captured(folder.add())
        await shipper.wait_shipped(1, 5)
        closed = await shipper.close_log(5)
        folder.add()
        shipper.captured(2)
    end = await log.last()
    assert isinstance(end.entry, Seal)
    assert (end.entry.kind, end.entry.txid, end.sequence) == (SealKind.CLOSE, 1, closed.sequence)


async def test_g3_leader_of_the_log_dies_while_a_backlog_is_shipped(
    nats_cluster: NatsCluster, folder: Folder
) -> None:
    """Of three servers the one that leads the log is killed: all is in the log once, in order."""
    for _ in range(600):
        folder.add()
    async with connected(*nats_cluster.urls, ping_interval=0.3) as bus:
        log = await make_log(bus, replicas=3)
        async with shipping(log, folder) as shipper:
            await shipper.wait_shipped(100, 10)
            nats_cluster.kill(nats_cluster.index(nats_cluster.stream_leader(STREAM)))
            await shipper.wait_shipped(600, 40)
        assert await stored(log) == list(range(1, 601))


async def test_speed_of_shipping(log: WalLog, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """How fast a backlog is shipped, and how long one transaction takes from its file to the log."""
    for _ in range(2000):
        folder.add()
    async with shipping(log, folder) as shipper:
        began = time.perf_counter()
        await shipper.wait_shipped(2000, 60)
        rate = 2000 / (time.perf_counter() - began)
        delays: list[float] = []
        for _ in range(200):
            began = time.perf_counter()
            txid = folder.add()
            shipper.captured(txid)
            await shipper.wait_shipped(txid, 5)
            delays.append(time.perf_counter() - began)
    with capsys.disabled():
        median = 1e3 * statistics.median(delays)
        print(f"\n    shipped {rate:.0f}/s; one file: median {median:.2f} ms")
    assert rate > 50


# --- counting transactions


def _header(wal: Path, offset: int, size: int) -> ltx.Header:
    head = wal.read_bytes()[:32]
    salts = [int.from_bytes(head[at : at + 4], "big") for at in (16, 20)]
    return ltx.Header(
        page_size=4096,
        commit=1,
        min_txid=2,
        max_txid=2,
        wal_offset=offset,
        wal_size=size,
        wal_salt1=salts[0],
        wal_salt2=salts[1],
    )


def test_transactions_are_counted_in_the_wal(tmp_path: Path) -> None:
    """As many as SQLite has committed in that part of the WAL; unknown once it was begun anew or is gone."""
    path, wal = tmp_path / "a.db", tmp_path / "a.db-wal"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE t (x)")
        begin = wal.stat().st_size
        for number in range(7):
            db.execute("INSERT INTO t VALUES (?)", (bytes(10_000 * number),))
        header = _header(wal, begin, wal.stat().st_size - begin)
        assert count_commits(wal, header) == 7
        first = _header(wal, 32, begin - 32)
        assert count_commits(wal, first) == 1
        assert count_commits(wal, _header(wal, begin, 0)) is None
        assert count_commits(wal, _header(wal, begin + 1, 4120)) is None
        assert count_commits(wal, _header(wal, wal.stat().st_size, 4120)) is None
        db.execute("PRAGMA wal_checkpoint(RESTART)")
        for number in range(20):
            db.execute("INSERT INTO t VALUES (?)", (bytes(10_000 * number),))
        assert count_commits(wal, header) is None
    assert count_commits(wal, header) is None
