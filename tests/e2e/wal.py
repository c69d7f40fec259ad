"""Parts for tests of an app's WAL log: a bus, its streams, LTX files, and a replica in memory."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import create_stream, objects_config, wal_config
from phalanx.config import NatsOptions
from phalanx.data import ltx
from phalanx.data.entries import Draft
from phalanx.data.log import WalLog
from phalanx.data.records import Backlog
from phalanx.data.shipping import Captured
from phalanx.errors import DatabaseError
from phalanx.names import Names
from phalanx.types import Position

NAMES = Names("prod")
APP = "wiki"
STREAM = NAMES.wal_stream(APP)
PAGE_SIZE = 4096


@asynccontextmanager
async def connected(*urls: str, ping_interval: float = 1.0) -> AsyncGenerator[NatsBus]:
    """A bus that is closed at the end."""
    bus = await NatsBus.connect(NatsOptions(urls=urls), name="test", ping_interval=ping_interval)
    try:
        yield bus
    finally:
        await bus.close()


async def make_log(bus: NatsBus, replicas: int = 1) -> WalLog:
    """The log of the app, made as a node makes it."""
    await create_stream(bus, wal_config(NAMES, APP, replicas=replicas))
    await create_stream(bus, objects_config(NAMES, APP, replicas=replicas))
    return WalLog(bus, NAMES, APP)


def ltx_file(txid: int, size: int = 0) -> bytes:
    """An LTX file with that transaction; *size*: about how many bytes, in pages that do not compress."""
    count = max(1, size // PAGE_SIZE)
    header = ltx.Header(page_size=PAGE_SIZE, commit=count + 1, min_txid=txid, max_txid=txid)
    if txid == 1:
        count += 1
    content = secrets.token_bytes(PAGE_SIZE) if size else txid.to_bytes(8, "big") * (PAGE_SIZE // 8)
    return ltx.encode(header, (ltx.Page(number, content) for number in range(1, count + 1)))


def draft(epoch: int, txid: int, content: bytes | None = None) -> Draft:
    """A record to append."""
    data = ltx_file(txid) if content is None else content
    return Draft(epoch, txid, data, len(data))


class MemoryReplica:
    """A replica that keeps what it was given, and refuses what does not go on."""

    def __init__(self, position: Position | None = None, delay_seconds: float = 0.0) -> None:
        self._position = position or Position()
        self.delay_seconds = delay_seconds
        self.data: dict[int, bytes] = {}
        self.calls: list[tuple[str, int]] = []
        self.synced = Position()
        self.path = Path("gen-0/replica.db")
        self._turn = asyncio.Lock()

    @property
    def position(self) -> Position:
        return self._position

    async def apply(self, sequence: int, txid: int, data: bytes | Path) -> Position:
        content = data if isinstance(data, bytes) else data.read_bytes()  # noqa: ASYNC240
        async with self._turn:
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            if (sequence, txid) != (self._position.sequence + 1, self._position.txid + 1):
                raise DatabaseError(f"{sequence}/{txid} does not go on from {self._position}")
            ltx.decode(content)
            self.data[txid] = content
            self._position = Position(sequence, txid)
            self.calls.append(("apply", sequence))
        return self._position

    async def skip(self, sequence: int) -> Position:
        async with self._turn:
            if sequence != self._position.sequence + 1:
                raise DatabaseError(f"{sequence} does not go on from {self._position}")
            self._position = Position(sequence, self._position.txid)
            self.calls.append(("skip", sequence))
        return self._position

    async def sync(self) -> Position:
        async with self._turn:
            self.synced = self._position
        return self.synced


class Folder:
    """Captured files, as Litestream would leave them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.last = 0

    def add(self, content: bytes | None = None, *, txid: int | None = None) -> int:
        """One more transaction."""
        self.last = self.last + 1 if txid is None else txid
        data = ltx_file(self.last) if content is None else content
        temporary = self.path / "new.tmp"
        temporary.write_bytes(data)
        temporary.rename(self.path / ltx.file_name(self.last, self.last))
        return self.last

    def forget(self, up_to_txid: int) -> None:
        """See ``Capture.forget``."""
        for file in self.files(0)[:-1]:
            if file.txid <= up_to_txid:
                file.path.unlink()

    def files(self, after: int, limit: int | None = None) -> Sequence[Captured]:
        """See ``shipping.Source``."""
        found = [(ltx.parse_file_name(path.name), path) for path in self.path.iterdir()]
        return sorted(
            (Captured(txids[1], path) for txids, path in found if txids and txids[1] > after),
            key=lambda each: each.txid,
        )[:limit]

    def backlog(self, after: int) -> Backlog:
        """See ``shipping.Source``."""
        files = self.files(after)
        return Backlog(len(files), sum(file.path.stat().st_size for file in files))
