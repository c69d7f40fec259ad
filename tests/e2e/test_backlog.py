"""Very many captured files wait for the log: the event loop, which the keeper watches, never stands still."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.e2e.wal import STREAM, connected, ltx_file, make_log
from tests.waiting import until

from phalanx.data import ltx
from phalanx.data.captured_files import CapturedFiles
from phalanx.data.entries import SealKind
from phalanx.data.litestream import Paths
from phalanx.data.records import Backlog, Records
from phalanx.data.shipping import Shipper
from phalanx.testing.nats import NatsServer
from phalanx.types import Position

FILES, SOUND_FILES = 30_000, 100
BUSY_SECONDS, STILL_SECONDS = 0.1, 1.0
"""How long the loop's thread may work without a pause, and how long it may stand still for whatever reason,
the rest of the machine included; the keeper kills a node whose loop does so for 2 s."""


@asynccontextmanager
async def watched() -> AsyncGenerator[list[tuple[float, float]]]:
    """How late the loop was with a timer of a millisecond each time, and how long its thread then worked."""
    late = [(0.0, 0.0)]

    async def watch() -> None:
        while True:
            began, worked = time.monotonic(), time.thread_time()
            await asyncio.sleep(0.001)
            late.append((time.monotonic() - began, time.thread_time() - worked))

    watching = asyncio.create_task(watch())
    try:
        yield late
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def fill(level0: Path) -> list[int]:
    """Files of so many transactions, and their sizes. Of most of them the name is wrong."""
    level0.mkdir(parents=True)
    for txid in range(1, SOUND_FILES + 1):
        (level0 / ltx.file_name(txid, txid)).write_bytes(ltx_file(txid))
    last = level0 / ltx.file_name(SOUND_FILES, SOUND_FILES)
    for txid in range(SOUND_FILES + 1, FILES + 1):
        os.link(last, level0 / ltx.file_name(txid, txid))
    newest = level0 / ltx.file_name(FILES, FILES)
    newest.unlink()
    newest.write_bytes(ltx_file(FILES))
    return [(level0 / ltx.file_name(txid, txid)).stat().st_size for txid in range(1, FILES + 1)]


@pytest.mark.alone
async def test_loop_goes_on_while_very_many_files_wait(tmp_path: Path, nats_server: NatsServer) -> None:
    """Start, settling, shipping, a full log and the size of the backlog: nothing of it takes long."""
    paths = Paths(tmp_path / "wiki.db", tmp_path / "phalanx")
    sizes = await asyncio.to_thread(fill, paths.level0)
    async with connected(nats_server.url()) as bus, watched() as late:
        log = await make_log(bus)
        sealed = await log.seal(1, "n1", SealKind.OPEN)
        records = Records(paths)
        await asyncio.to_thread(records.open, sealed.txid)
        files = await asyncio.to_thread(CapturedFiles, paths.folder)
        assert files.last == records.newest == FILES
        await asyncio.to_thread(files.drop_broken_chain, 0)
        config = (await bus.api(f"STREAM.INFO.{STREAM}", {}))["config"]
        full = {**config, "max_bytes": 20_000}
        await bus.api(f"STREAM.UPDATE.{STREAM}", full)
        backlogs: list[int] = []
        shipper = Shipper(
            log,
            records,
            epoch=1,
            node="n1",
            base=Position(sealed.sequence, sealed.txid),
            on_fenced=lambda error: None,
            on_backlog=backlogs.append,
            forget=records.forget,
        )
        await shipper.start()
        try:
            await until(lambda: backlogs and shipper.failing)
            assert backlogs[0] == sum(sizes)
            await bus.api(f"STREAM.UPDATE.{STREAM}", config)
            await shipper.wait_shipped(SOUND_FILES, 10)
            left = sizes[SOUND_FILES:]
            await until(lambda: shipper.backlog() == Backlog(len(left), sum(left)))
        finally:
            await shipper.stop()
        assert max(worked for _, worked in late) < BUSY_SECONDS
        assert max(waited for waited, _ in late) < STILL_SECONDS
