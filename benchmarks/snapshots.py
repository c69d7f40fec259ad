"""How long a new standby takes to get a large database out of a snapshot."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import msgspec

from benchmarks.figures import Peer, Run
from benchmarks.replication_failover import fill
from benchmarks.replication_stage import DataStage, resident_bytes
from benchmarks.stage import APP
from phalanx import system
from phalanx.data.log import WalLog
from phalanx.data.snapshots import Snapshots
from phalanx.data.status import SnapshotProgress, SnapshotRequest
from phalanx.observe.audit import read_audit
from phalanx.ports import Message

MEGABYTES = 1000
MAX_RSS_BYTES = 200_000_000
MAKE_SECONDS = 300.0
BOOTSTRAP_SECONDS = 300.0
LOOK_SECONDS = 0.05


async def bootstrap(run: Run) -> None:
    """Start of a node without data → its replica of 1 GB follows, in s; beside lz4 through a pipe."""
    stage = DataStage(servers=1)
    stage.live("n1").parent.mkdir()
    run.say(f"writing a database of {MEGABYTES} MB, which n1 adopts")
    await asyncio.to_thread(fill, stage.live("n1"), MEGABYTES)
    async with stage:
        active, standby = await stage.pair()
        await stage.wait_following(standby, BOOTSTRAP_SECONDS)
        await _snapshot(run, stage, standby)
        peers: list[float] = []
        for _ in range(run.runs):
            peers.append(await asyncio.to_thread(_pipe, stage.live(active), stage.folder / "piped"))
            name = f"{_packer()} through a pipe, same run"
            run.peer = Peer(name, statistics.median(peers), given=False)
            stage.nodes[standby].stop()
            shutil.rmtree(stage.live(standby).parent)
            since, began = system.wall(), system.now()
            stage.nodes[standby].start()
            most = await _bootstrapped(stage, standby)
            took = system.now() - began
            memory = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in most.items())
            told = await _told(stage, standby, since)
            run.add(took, f"{took:.2f} s ({told}); pipe {peers[-1]:.2f} s; MB: {memory}")
            if max(most.values()) > MAX_RSS_BYTES:
                run.problems.append(f"resident memory in MB: {memory}")


async def _snapshot(run: Run, stage: DataStage, node: str) -> None:
    """Make one, and remove the log before it: what a new standby needs is in the snapshot alone."""
    began = system.now()
    request = msgspec.json.encode(SnapshotRequest(by="benchmark", quiet=True))
    subject = stage.names.database_subject(APP, "snapshot", node)
    # It says now and then that it is at work; the last answer has a name or an error.
    made = SnapshotProgress()

    def is_last(answer: Message) -> bool:
        nonlocal made
        made = msgspec.json.decode(answer.data, type=SnapshotProgress)
        return bool(made.name or made.error)

    await stage.bus.gather(subject, request, timeout=MAKE_SECONDS, most=1_000_000, is_last=is_last)
    if not made.name:
        raise RuntimeError(f"no snapshot was made: {made.error}")
    log = WalLog(stage.bus, stage.names, APP)
    found = await Snapshots(log.objects, log, APP).find(made.name)
    await log.purge(found.sequence)
    run.say(
        f"snapshot of {found.raw_bytes / 1e6:.0f} MB in {system.now() - began:.1f} s, "
        f"{found.size_bytes / 1e6:.0f} MB stored"
    )


def _packer() -> str:
    """The program to compare with. Raises RuntimeError if there is none."""
    found = next((name for name in ("lz4", "zstd") if shutil.which(name)), "")
    if not found:
        raise RuntimeError("neither lz4 nor zstd is there to compare with; on Debian: apt-get install lz4")
    return found


def _pipe(source: Path, target: Path) -> float:
    """Seconds to pack *source* and unpack it again, through a pipe."""
    target.unlink(missing_ok=True)
    packer, began = _packer(), system.now()
    pack, unpack = [packer, "-q", "-c", str(source)], [packer, "-q", "-d", "-c"]
    with target.open("wb") as out, subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        subprocess.run(unpack, stdin=packing.stdout, stdout=out, check=True)
    took = system.now() - began
    if target.stat().st_size != source.stat().st_size:
        raise RuntimeError(f"{packer} gave {target.stat().st_size} bytes")
    target.unlink()
    return took


async def _bootstrapped(stage: DataStage, node: str) -> Counter[str]:
    """Wait until *node* follows with its whole database; the most memory of each of its processes."""
    most: Counter[str] = Counter()
    end, deadline = await stage.log_end(), system.now() + BOOTSTRAP_SECONDS
    while True:
        for name, pid in stage.processes(node).items():
            most[name] = max(most[name], resident_bytes(pid))
        readable = stage.readable(node)
        if readable.exists() and readable.stat().st_size > 0.9e6 * MEGABYTES:
            status = await stage.status(node)
            if status is not None and status.role == "following" and status.position.sequence >= end:
                return most
        if system.now() > deadline:
            raise TimeoutError(f"{node} has not been bootstrapped\n{stage.last_words()}")
        await asyncio.sleep(LOOK_SECONDS)


async def _told(stage: DataStage, node: str, since: float) -> str:
    for entry in await read_audit(stage.bus, stage.names, since=since, limit=100):
        if entry.node == node and entry.action == "replica-bootstrapped":
            return f"{entry.duration_seconds or 0:.2f} s of it {entry.reason.partition(':')[0]}"
    return "the node does not say how"
