"""Gathers what a run leaves behind, and looks at replicas while it goes on."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import msgspec

from benchmarks.replication_validation.chaos import Inflicted
from benchmarks.replication_validation.checker import Evidence, Sample, SetAside
from benchmarks.replication_validation.databases import Content, read, replay, replica_of
from benchmarks.stage import APP, PLATFORM, Stage
from phalanx import NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.data.settlement import Diverged
from phalanx.observe.audit import AuditEntry

SETTLE_SECONDS = 60.0
AUDIT_LIMIT = 100_000
LOOK_SECONDS = 0.05
CHECK_EVERY = 20
"""Every so many looks at a replica it is checked as a whole."""


def live_path(folder: Path, node: str) -> Path:
    """Where the database of *node* lies while that is active."""
    return folder / node / "wiki.db"


class Reader:
    """``async with``: reads the replicas in turn, as programs on standbys do, and checks what it sees."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self._nodes, self._folder = list(stage.nodes), folder
        self.samples: list[Sample] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="reader")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        for count in itertools.count(1):
            node = self._nodes[count % len(self._nodes)]
            sample = await asyncio.to_thread(self._look, node.node, count % CHECK_EVERY == 0)
            if sample is not None and node.is_running:
                self.samples.append(sample)
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, node: str, check: bool) -> Sample | None:
        """None where there is nothing to read just now: the node is active, or its files are moved."""
        live = live_path(self._folder, node)
        try:
            path = replica_of(live)
            if path == live:
                return None
            connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1.0)
        except (OSError, sqlite3.Error, msgspec.DecodeError):
            return None
        try:
            return _seen(connection, node, check)
        except sqlite3.Error as error:
            is_damage = getattr(error, "sqlite_errorcode", 0) in (
                sqlite3.SQLITE_CORRUPT,
                sqlite3.SQLITE_NOTADB,
            )
            return Sample(node, system.now(), 0, (f"{error}",)) if is_damage else None
        finally:
            connection.close()


def _seen(connection: sqlite3.Connection, node: str, check: bool) -> Sample | None:
    at = system.now()
    connection.execute("BEGIN")
    found = connection.execute("SELECT max(number), count(*) FROM entries").fetchone()
    number, count = found[0] or 0, found[1]
    problems = [f"{count} rows up to row {number}"] if number != count else []
    torn = "SELECT number FROM cells GROUP BY number, cells HAVING count(*) != cells"
    problems += [f"half of transaction {row[0]}" for row in connection.execute(torn)]
    if check:
        problems += [row[0] for row in connection.execute("PRAGMA quick_check") if row[0] != "ok"]
    return Sample(node, at, number, tuple(problems))


# --- at the end


async def collect(
    stage: Stage, folder: Path, inflicted: Sequence[Inflicted], samples: Sequence[Sample]
) -> Evidence:
    """All evidence. Nobody writes any more. Raises PhalanxError, OSError, TimeoutError."""
    async with PlatformClient(PLATFORM, NatsOptions(urls=tuple(stage.urls))) as client:
        await _settled(client)
        verification = await client.databases.verify(APP)
        fingerprints = {each.node: each.fingerprint for each in verification.nodes if each.fingerprint}
        databases = {node.node: await _read(live_path(folder, node.node)) for node in stage.nodes}
        notes = _notes(folder)
        stage.read()
        reigns = {event.epoch for event in stage.events if event.kind == "opened"}
        audit = await _audit(client, notes, reigns)
        work = folder / "replayed"
        work.mkdir()
        replayed = await replay(client.bus, client.names, APP, [note.sequence for note in notes], work)
    aside = [
        SetAside(
            node=note.node,
            epoch=note.epoch,
            sequence=note.sequence,
            transactions=note.transactions,
            exact=note.exact,
            reported=note.reported,
            file=note.file,
            content=await asyncio.to_thread(read, Path(note.file)),
        )
        for note in notes
    ]
    events = sorted(stage.events, key=lambda event: event.at)
    return Evidence(events, audit, replayed, databases, aside, inflicted, samples, fingerprints)


async def told(stage: Stage) -> str:
    """What the nodes say of themselves, for those who look for why it does not go on."""
    lines: list[str] = []
    async with PlatformClient(PLATFORM, NatsOptions(urls=tuple(stage.urls))) as client:
        for view in await client.nodes():
            apps = view.status.apps if view.status is not None else ()
            lines += [f"{view.node}: live {view.is_live}, {app.role} {app.reason}" for app in apps]
        lines += [str(status) for status in (await client.databases.status(APP)).nodes]
    return "\n".join(lines)


async def _read(live: Path) -> Content:
    return await asyncio.to_thread(lambda: read(replica_of(live)))


async def _settled(client: PlatformClient) -> None:
    """Wait until one database is live and all replicas have its last transaction."""
    deadline = system.now() + SETTLE_SECONDS
    while True:
        view = await client.databases.status(APP)
        roles = sorted(node.role for node in view.nodes)
        positions = {node.position for node in view.nodes}
        if roles == ["following"] * (len(roles) - 1) + ["live"] and len(positions) == 1 and not view.silent:
            return
        if system.now() > deadline:
            told = "; ".join(f"{n.node} {n.role} {n.position} {n.reason}" for n in view.nodes)
            raise TimeoutError(f"not all replicas have caught up after {SETTLE_SECONDS:g} s: {told}")
        await asyncio.sleep(0.1)


def _notes(folder: Path) -> list[Diverged]:
    """Of all databases that were set aside. One whose file was never made is what a crash has left."""
    found = [
        msgspec.json.decode(path.read_bytes(), type=Diverged)
        for path in sorted(folder.glob("*/wiki.db.diverged-*.json"))
    ]
    return [note for note in found if Path(note.file).exists()]


async def _audit(client: PlatformClient, notes: Sequence[Diverged], reigns: set[int]) -> list[AuditEntry]:
    """The whole audit log, once it has what there is to report.

    Nodes deliver it with a delay: entries wait on disk, up to 5 s between tries, while NATS has faults.
    """
    deadline = system.now() + 20
    while True:
        entries = await client.audit(limit=AUDIT_LIMIT)
        files = {entry.details.get("file") for entry in entries}
        promoted = {entry.epoch for entry in entries if entry.action == "database-promoted"}
        complete = reigns <= promoted and all(note.file in files for note in notes)
        if complete or system.now() > deadline:
            return [entry for entry in entries if entry.app == APP]
        await asyncio.sleep(0.1)
