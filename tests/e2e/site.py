"""An active node's database that is captured and shipped for real, and a standby's replica of it."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from tests.e2e.wal import APP, NAMES

from phalanx.bus.connection import NatsBus
from phalanx.data import ltx
from phalanx.data.entries import Draft, SealKind
from phalanx.data.image_process import ImageSource
from phalanx.data.log import WalLog
from phalanx.data.objects import ObjectStore
from phalanx.data.replica import Replica
from phalanx.data.restoring import Restoring, Wanted
from phalanx.data.snapshots import Snapshots
from phalanx.types import Position

LITESTREAM = str(Path(sys.executable).parent / "litestream")


class Site:
    """An active node's database, captured by Litestream and shipped, and a standby's replica of it."""

    def __init__(self, folder: Path, bus: NatsBus, wal: WalLog, page_size: int) -> None:
        self.folder, self.log = folder, wal
        self.live = folder / "live.db"
        self.capture = folder / ".live.db-litestream" / "ltx" / "0"
        self.second = folder / "litestream"
        self.replica = Replica.open(folder / "replica")
        self.snapshots = Snapshots(ObjectStore(bus, NAMES, APP), wal, APP, "n2")
        self.restoring = Restoring(self.snapshots)
        self.database = sqlite3.connect(self.live, isolation_level=None)
        self.database.execute(f"PRAGMA page_size = {page_size}")
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA wal_autocheckpoint = 0")
        self.database.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x REAL, y BLOB)")
        self.sequence, self.txid, self.epoch = 0, 0, 0
        self.positions: list[Position] = []
        self._chance = random.Random(page_size)

    def close(self) -> None:
        self.database.close()
        self.replica.close()

    async def begin(self, epoch: int) -> None:
        """A reign begins."""
        self.epoch = epoch
        self.sequence = (await self.log.seal(epoch, "n1", SealKind.OPEN)).sequence
        self.replica.skip(self.sequence)

    async def commit(
        self, statement: str = "", *, rows: int = 3, size: int = 500, apply: bool = True
    ) -> None:
        """One transaction: made, captured, shipped, applied."""
        for at in range(rows if not statement else 0):
            self.database.execute("INSERT INTO t(x, y) VALUES (?, ?)", (at, self._chance.randbytes(size)))
        if statement:
            self.database.execute(statement)
        await asyncio.to_thread(litestream, "replicate", "-once", str(self.live), f"file://{self.second}")
        for path in sorted(self.capture.iterdir()):
            txids = ltx.parse_file_name(path.name)
            if txids is not None and txids[1] > self.txid:
                await self.ship(path, txids[1], apply=apply)

    async def ship(self, path: Path, txid: int, *, apply: bool = True) -> None:
        """One captured file into the log, and into the replica."""
        data = path.read_bytes()  # noqa: ASYNC240
        self.sequence = await self.log.append(self.sequence, Draft(self.epoch, txid, path, len(data)))
        self.txid = txid
        self.positions.append(Position(self.sequence, txid))
        if apply:
            self.replica.apply(self.sequence, txid, data)

    @property
    def source(self) -> ImageSource:
        """The standby's replica."""
        assert self.replica.path is not None
        return ImageSource(self.replica.path, journal=self.replica.path.parent / "journal")

    def expected(self, txid: int) -> bytes:
        """The database at *txid* as Litestream restores it."""
        target = self.folder / f"expected-{txid}.db"
        if not target.exists():
            litestream("restore", "-txid", f"{txid:016x}", "-o", str(target), f"file://{self.second}")
        return target.read_bytes()

    async def restore(self, **wanted: object) -> bytes:
        """What comes out of a restore."""
        target = self.folder / f"restored-{time.monotonic_ns()}.db"
        await self.restoring.restore(Wanted(**wanted), target)  # pyright: ignore
        left = [path.name for path in self.folder.iterdir() if path.name.startswith((target.name, "."))]
        assert sorted(left) == [".live.db-litestream", target.name]
        return target.read_bytes()


def litestream(*arguments: str) -> None:
    """One run of Litestream, which must go well."""
    done = subprocess.run([LITESTREAM, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def pieces(data: bytes, size: int = 100_000) -> AsyncGenerator[bytes]:
    """*data* as a stream."""
    for at in range(0, len(data), size):
        yield data[at : at + size]
