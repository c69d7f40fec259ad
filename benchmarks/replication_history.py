"""A log with a long history costs those who follow it no more than a short one."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from benchmarks import replication_programs as programs
from benchmarks.figures import Run
from benchmarks.replication import measure_lag
from benchmarks.replication_stage import DataStage, processor_seconds
from benchmarks.stage import APP
from phalanx import NatsOptions, system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import create_stream, wal_config
from phalanx.data import ltx
from phalanx.data.entries import Draft, SealKind, seal_body, seal_headers
from phalanx.data.log import EXPECTED

RECORDS = 100_000
AT_ONCE = 500
EPOCH = 1
"""Of the history; the platform's first leader has a higher one."""

RATE = 100.0
SECONDS = 8.0
"""Of load in each turn."""

CATCH_UP_SECONDS = 600.0
MOST = 1.2
"""Of the processor time, as the table says it of the lag."""


async def history(run: Run) -> None:
    """Lag with 100,000 records in the log to that with none, in turns; the follower's processor time, too."""
    shares: list[float] = []
    async with DataStage(servers=1) as short, _OldStage(servers=1) as long:
        await long.pair()
        run.say(f"the log with a history ends at {await long.log_end()}")
        for number in range(run.runs):
            pair = [short, long] if number % 2 else [long, short]
            found = {stage: await _turn(stage) for stage in pair}
            (lag, cost), (long_lag, long_cost) = found[short], found[long]
            shares.append(long_cost / cost)
            run.add(
                long_lag / lag,
                f"lag {long_lag:.2f} ms to {lag:.2f}; node and replica process {100 * long_cost:.1f} % of a "
                f"core to {100 * cost:.1f} %",
            )
        messages = int((await _state(long))["messages"])
    share = statistics.median(shares)
    run.say(f"processor time with the history: {share:.2f} x")
    if share > MOST:
        run.problems.append(f"the follower takes {share:.2f} times the processor time")
    if messages < RECORDS:
        run.problems.append(f"the log holds only {messages} entries: somebody has purged it")


async def _turn(stage: DataStage) -> tuple[float, float]:
    """Median lag in ms, and the share of a core that the standby's node and replica process took."""
    _, standby = await stage.pair()
    processes = stage.processes(standby)
    pids = processes["node"], processes["replica process"]
    began, before = system.now(), sum(map(processor_seconds, pids))
    found = await measure_lag(stage, RATE, SECONDS)
    cost = (sum(map(processor_seconds, pids)) - before) / (system.now() - began)
    return statistics.median(found), cost


async def _state(stage: DataStage) -> dict[str, Any]:
    return (await stage.bus.api(f"STREAM.INFO.{stage.names.wal_stream(APP)}", {}))["state"]


class _OldStage(DataStage):
    """The platform's database has a long history before its nodes start: they apply it first."""

    async def __aenter__(self) -> Self:
        assert self.nats is not None
        try:
            self.nats.start()
            await self.nats.ready()
            await self._write_history()
        except BaseException:
            await self.close()
            raise
        return await super().__aenter__()

    async def _write_history(self) -> None:
        bus = await NatsBus.connect(NatsOptions(urls=tuple(self.urls)), name="history", timeout=5)
        try:
            await create_stream(bus, wal_config(self.names, APP, replicas=1))
            with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
                records = _records(Path(folder) / "wiki.db")
            subject, seals = self.names.wal_record_subject(APP), self.names.wal_seal_subject(APP)
            opened = seal_body(EPOCH, "n0", 0, SealKind.OPEN, "benchmark")
            await bus.write(seals, opened, headers={**seal_headers(EPOCH, "open"), EXPECTED: "0"})
            txid = 0
            while batch := list(itertools.islice(records, AT_ONCE)):
                writes: list[Any] = []
                for data in batch:
                    txid += 1
                    draft = Draft(EPOCH, txid, data, len(data), 1)
                    headers = {**draft.headers(None), EXPECTED: str(txid)}
                    writes.append(bus.write(subject, data, headers=headers, timeout=30))
                await asyncio.gather(*writes)
            closed = seal_body(EPOCH, "n0", txid, SealKind.CLOSE, "benchmark")
            headers = {**seal_headers(EPOCH, "close"), EXPECTED: str(txid + 1)}
            await bus.write(seals, closed, headers=headers)
        finally:
            await bus.close()

    async def wait_steady(self, *, steered: bool = False, timeout: float = CATCH_UP_SECONDS) -> str:
        """Standbys have to catch up first."""
        return await super().wait_steady(steered=steered, timeout=timeout)


def _records(database: Path) -> Iterator[bytes]:
    """LTX files: a whole database, then one page of it again and again, with another text in its one row."""
    connection = programs.open_writer(str(database))
    connection.execute("INSERT INTO bench VALUES (1, ?)", (programs.TEXT,))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = database.read_bytes()
    size = int.from_bytes(content[16:18], "big")
    pages = [ltx.Page(at // size + 1, content[at : at + size]) for at in range(0, len(content), size)]
    changing = next(page for page in pages if programs.TEXT.encode() in page.data)
    place = changing.data.index(programs.TEXT.encode())
    return _encoded(pages, changing, place, size)


def _encoded(pages: list[ltx.Page], changing: ltx.Page, place: int, size: int) -> Iterator[bytes]:
    for txid in range(1, RECORDS + 1):
        header = ltx.Header(
            page_size=size,
            commit=len(pages),
            min_txid=txid,
            max_txid=txid,
            time_ms=time.time_ns() // 1_000_000,
        )
        text = b"%08d" % txid
        data = changing.data[:place] + text + changing.data[place + len(text) :]
        changed = [ltx.Page(changing.number, data)]
        yield ltx.encode(header, pages if txid == 1 else changed)
