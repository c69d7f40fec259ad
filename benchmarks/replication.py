"""How fast commits follow to a standby, and what that costs the writer and the nodes."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from benchmarks import replication_peer
from benchmarks import replication_programs as programs
from benchmarks.figures import Peer, Run, percentile
from benchmarks.replication_stage import (
    HOUR,
    DataStage,
    Program,
    lags,
    processor_seconds,
    program,
)
from benchmarks.stage import APP, PLATFORM
from phalanx import ActiveContext, Platform, SQLite, system
from phalanx.config import NatsOptions
from phalanx.testing.history import History
from phalanx.testing.nats import NatsCluster
from phalanx.testing.nodes import PROGRAM, Nodes
from phalanx.testing.program import Settings

LAG_RATE, LOAD_RATE = 30.0, 500.0
SETTLE_SECONDS = 2.0
"""After the start, before anything is measured."""

GROWTH, GROWTH_MS = 1.5, 1.0
"""By so much the lag of the last third may exceed that of the first: noise of the machine is no growth."""

COMMITS = 100_000
"""Of a turn of the writer flat out: some 2 s. Litestream checkpoints whenever it has captured some 16,000,
and the writer waits for that. A turn has to be long enough for several: one more or less is chance."""

IDLE_SECONDS = 10.0
WINDOW_SECONDS = 30.0


# --- lag


async def lag(run: Run) -> None:
    """Commit → readable on the standby by another process, in ms; each run is a second of commits."""
    run.peer = Peer(
        "litestream restore -f, same run",
        await replication_peer.follow_lag(LAG_RATE, min(10.0, run.runs)),
        given=False,
    )
    async with DataStage() as stage:
        found = await measure_lag(stage, LAG_RATE, float(run.runs))
    run.values += found
    run.say(_summary(found))


async def load(run: Run) -> None:
    """The same at 500 commits a second; the last third must not lag more than the first."""
    async with DataStage() as stage:
        found = await measure_lag(stage, LOAD_RATE, float(run.runs))
    run.values += found
    run.say(_summary(found))
    third = max(1, len(found) // 3)
    run.say(f"first third: {_summary(found[:third])}")
    run.say(f"last third: {_summary(found[-third:])}")
    first, last = statistics.median(found[:third]), statistics.median(found[-third:])
    if last > GROWTH * first + GROWTH_MS:
        run.problems.append(
            f"the lag grows: median {first:.1f} ms in the first third, {last:.1f} in the last"
        )


async def measure_lag(stage: DataStage, rate: float, seconds: float) -> list[float]:
    """The lags in ms of all commits of *seconds*, in their order. Raises RuntimeError if one was not seen."""
    active, standby = await stage.pair()
    await asyncio.sleep(SETTLE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-notes-") as name:
        notes = Path(name)
        with program(notes / "seen", "read", str(stage.live(standby))) as reader:
            count = max(1, int(rate * seconds))
            arguments = ("--rate", str(rate), "--count", str(count))
            with program(notes / "committed", "write", str(stage.live(active)), *arguments) as writer:
                await writer.ended(3 * seconds + 20)
                return [lag for _, lag in await all_seen(stage, writer, reader, count)]


async def all_seen(
    stage: DataStage, writer: Program, reader: Program, count: int, timeout: float = 30.0
) -> list[tuple[int, float]]:
    """The lags, once *count* commits were seen. Raises RuntimeError if they are not within *timeout* s."""
    deadline = system.now() + timeout
    while len(found := lags(writer, reader)) < count:
        if system.now() > deadline:
            raise RuntimeError(
                f"only {len(found)} of {count} commits were seen on the standby\n{stage.last_words()}"
            )
        await asyncio.sleep(0.1)
    return found


def _summary(found: list[float]) -> str:
    ordered = sorted(found)
    return (
        f"{len(found)} commits: median {statistics.median(found):.2f} ms, "
        f"p95 {percentile(ordered, 95):.2f}, p99 {percentile(ordered, 99):.2f}, max {ordered[-1]:.2f}"
    )


# --- the writer


async def writer(run: Run) -> None:
    """Microseconds a commit flat out, with replication and in turns without it."""
    alone: list[float] = []
    async with DataStage() as stage:
        active, standby = await stage.pair()
        await asyncio.sleep(SETTLE_SECONDS)
        (stage.folder / "alone").mkdir()
        plain = stage.folder / "alone" / "wiki.db"
        for number in range(run.runs):
            # Each goes first in every second turn.
            if number % 2:
                without, replicated = (
                    await _flat_out(stage, plain),
                    await _flat_out(stage, stage.live(active)),
                )
                await stage.wait_following(standby)
            else:
                replicated = await _flat_out(stage, stage.live(active))
                await stage.wait_following(standby)
                without = await _flat_out(stage, plain)
            alone.append(without)
            run.peer = Peer("without replication, same run", statistics.median(alone), given=False)
            run.add(
                replicated,
                f"{replicated:.1f} us a commit, {without:.1f} without: {without / replicated:.2f} of the "
                "throughput",
            )


async def _flat_out(stage: DataStage, database: Path) -> float:
    """Microseconds a commit."""
    notes = stage.folder / f"flat-{system.now()}"
    with program(notes, "write", str(database), "--count", str(COMMITS)) as running:
        await running.ended(120)
        (first, begin, _), (last, end, _) = running.notes()
    return 1e6 * (end - begin) / (last - first)


# --- the barrier


async def sync(run: Run) -> None:
    """One small commit and ``ctx.db.sync()`` after it, in ms; three nats-servers, and a standby besides."""
    done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    async def serve(ctx: ActiveContext) -> None:
        ctx.ready()
        try:
            done.set_result(await _barriers(ctx, run.runs))
        except Exception as error:
            done.set_exception(error)

    async with _platform() as (platform, folder, standby):
        app = platform.app(APP, database=SQLite(str(folder / "own" / "wiki.db")))
        app.on_active(serve)
        async with platform:
            await asyncio.sleep(0)
            standby.start()
            found = await asyncio.wait_for(done, 60 + run.runs)
    run.values += found
    run.say(_summary(found))


async def _barriers(ctx: ActiveContext, count: int) -> list[float]:
    connection = programs.open_writer(ctx.db.path)
    await asyncio.sleep(2 * SETTLE_SECONDS)  # the standby is there by then
    found: list[float] = []
    try:
        for number in range(count):
            began = time.perf_counter()
            connection.execute("INSERT INTO bench VALUES (?, ?)", (number, programs.TEXT))
            await ctx.db.sync()
            found.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(0.02)
    finally:
        connection.close()
    return found


@contextlib.asynccontextmanager
async def _platform() -> AsyncGenerator[tuple[Platform, Path, Nodes]]:
    """A node in this process, three nats-servers, and a node to be started that becomes the standby."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-db-") as name:
        folder = Path(name)
        (folder / "own").mkdir()
        async with NatsCluster(3) as nats:
            settings = Settings(
                history=str(folder / "history"),
                platform=PLATFORM,
                ttl=5.0,
                urls=tuple(nats.urls),
                database=str(folder / "{node}" / "wiki.db"),
                commit_seconds=HOUR,
                tick_seconds=HOUR,
            )
            History(settings.history).close()
            environment = {"PHALANX_TEST": msgspec.json.encode(settings).decode()}
            nodes = Nodes(PROGRAM, count=1, env=environment)
            platform = Platform(
                PLATFORM,
                node="n9",
                nats=NatsOptions(urls=tuple(nats.urls)),
                data_dir=str(folder / "data"),
                http={"port": 0},
                timings={"ttl": 5.0},
            )
            try:
                yield platform, folder, nodes
            finally:
                nodes.stop()


# --- idle


async def idle(run: Run) -> None:
    """Processor time of each node's processes in 30 s while nobody writes, in percent of one core."""
    async with DataStage() as stage:
        active, _ = await stage.pair()
        connection = programs.open_writer(str(stage.live(active)))  # a program that does nothing
        try:
            await asyncio.sleep(IDLE_SECONDS)
            who = {node.node: stage.processes(node.node) for node in stage.nodes}
            before = {pid: processor_seconds(pid) for each in who.values() for pid in each.values()}
            began = system.now()
            await asyncio.sleep(WINDOW_SECONDS)
            lasted = system.now() - began
            after = {pid: processor_seconds(pid) for pid in before}
        finally:
            connection.close()
        for node, processes in who.items():
            share = {role: 100 * (after[pid] - before[pid]) / lasted for role, pid in processes.items()}
            text = " + ".join(f"{role} {percent:.2f}" for role, percent in share.items())
            role = "active" if node == active else "standby"
            if node == active:
                run.add(sum(share.values()), f"{node}, {role}: {sum(share.values()):.2f} % = {text}")
            else:
                run.say(f"{node}, {role}: {sum(share.values()):.2f} % = {text}")
