"""The databases of a platform's apps, seen from outside of its nodes: ``PlatformClient.databases``.

::

    async with PlatformClient("prod", nats) as client:
        for node in (await client.databases.status("wiki")).nodes:
            print(node.node, node.role, node.position, node.lag_seconds)

What nodes know is asked of them (``phalanx.data.status``); snapshots are read from NATS directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from phalanx import system
from phalanx.client_caller import caller
from phalanx.data.gone import check_there
from phalanx.data.status import (
    RESTORE_FAILED,
    RESTORE_KEY,
    RESTORED,
    DbDifference,
    DbStatus,
    DbVerified,
    DiffRequest,
    DivergedFile,
    RestoreRequest,
    SnapshotProgress,
    SnapshotRequest,
)
from phalanx.errors import ConfigError, DatabaseError, StepDownFailed, StreamGone, WrongRevision
from phalanx.observe.audit import AuditEntry
from phalanx.ports import Message
from phalanx.types import Role

if TYPE_CHECKING:
    from phalanx.client import PlatformClient
    from phalanx.data.restoring import Restoring
    from phalanx.data.snapshots import Snapshots

T = TypeVar("T")

ANSWER_SECONDS = 2.0
"""For what a node answers from memory."""

SILENT_SECONDS = 30.0
"""How long nothing may be heard of a snapshot that a node makes."""

CALLED_OFF_SECONDS = 30.0
"""So much later than its deadline a request to restore in place vanishes by itself: it must not strike some
other day, when whoever asked was killed before it could call it off."""

VERIFY_TRIES = 2
"""How often all nodes are asked until two of them were looked at in the same position."""

_POLL_SECONDS = 0.25


class DatabaseView(msgspec.Struct, frozen=True, kw_only=True):
    """One app's database on all nodes. ``silent``: live nodes with that app that did not answer.
    ``problems``: what is wrong in NATS, such as a stream that is gone."""

    app: str
    nodes: tuple[DbStatus, ...]
    silent: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What all nodes found in their databases. ``ok`` unless there are ``problems``.

    ``compared``: the nodes whose databases were compared, with one another where two were seen in the same
    position, or with what snapshots and log give for it. ``notes``: why some were not.
    """

    app: str
    ok: bool
    compared: tuple[str, ...]
    nodes: tuple[DbVerified, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """A restore in place. ``node`` is active now; ``seconds``: from the request until then."""

    app: str
    node: str
    epoch: int
    seconds: float
    reason: str


class DatabaseClient:
    """Every call raises BusError and its kinds, and ConfigError for an app that has no database; those that
    need the app's log or object store, StreamGone when that is gone."""

    def __init__(self, client: PlatformClient) -> None:
        self._client = client

    # --- looking

    async def apps(self) -> list[str]:
        """The apps that have a database."""
        return list(await self._client.databases_made())

    async def status(self, app: str, *, timeout: float = ANSWER_SECONDS) -> DatabaseView:
        """Where each node is; returns once all live nodes have answered, at most *timeout* seconds later."""
        nodes = await self._nodes(app)
        answers = await self._ask(app, "status", DbStatus, nodes, timeout)
        found = {status.node: status for status in answers}
        return DatabaseView(
            app=app,
            nodes=tuple(found[node] for node in sorted(found)),
            silent=tuple(sorted(set(nodes) - set(found))),
            problems=tuple(str(gone) for gone in await self._gone(app)),
        )

    async def verify(self, app: str, *, timeout: float = 600.0) -> Verification:
        """Have every node read its whole database: SQLite's integrity check, and a fingerprint.

        Fingerprints are compared where positions are equal. While there are writes they hardly ever are: a
        node that is alone with its position is compared with what is restored for that here, in the
        temporary folder. *timeout*: for the answers, in seconds.
        """
        nodes = await self._nodes(app)
        answers: list[DbVerified] = []
        for _ in range(VERIFY_TRIES):
            answers = await self._ask(app, "verify", DbVerified, nodes, timeout)
            groups = _by_position(answers)
            if len(answers) < 2 or any(len(group) > 1 for group in groups):
                break
            if any(not answer.ok for answer in answers):
                break
        return await self._judge(app, nodes, answers)

    async def _judge(self, app: str, nodes: Sequence[str], answers: Sequence[DbVerified]) -> Verification:
        answered = {answer.node for answer in answers}
        problems = [f"node {node} does not answer" for node in nodes if node not in answered]
        problems += [
            f"node {answer.node}: {answer.problem or 'its database is damaged'}"
            for answer in answers
            if not answer.ok
        ]
        compared: list[str] = []
        notes: list[str] = []
        for group in _by_position(answers):
            if len(group) > 1:
                compared += [answer.node for answer in group]
                problems += _differences(group)
                continue
            [alone] = group
            try:
                expected = await self._restored_fingerprint(app, alone.position.sequence)
            except (DatabaseError, OSError) as error:
                notes.append(f"node {alone.node} is not compared: {error}")
                continue
            compared.append(alone.node)
            if expected != alone.fingerprint:
                problems.append(
                    f"node {alone.node} differs from what snapshots and log give for {alone.position}"
                )
        if len(answers) > 1 and not compared:
            problems += notes
        return Verification(
            app=app,
            ok=not problems,
            compared=tuple(sorted(compared)),
            nodes=tuple(sorted(answers, key=lambda answer: answer.node)),
            problems=tuple(problems),
            notes=tuple(notes),
        )

    async def _restored_fingerprint(self, app: str, sequence: int) -> str:
        """Of the database at that position, restored into a temporary file. DatabaseError, OSError."""
        from phalanx.data.restoring import Wanted

        restoring = await self.restoring(app)
        with tempfile.TemporaryDirectory(prefix="phalanx-verify-") as folder:
            file = Path(folder) / "database"
            await restoring.restore(Wanted(sequence=sequence), file, check=False)
            return await asyncio.to_thread(_sha256, file)

    async def diverged(self, app: str, *, timeout: float = ANSWER_SECONDS) -> list[DivergedFile]:
        """The databases that were set aside on all nodes, oldest first."""
        nodes = await self._nodes(app)
        lists = await self._ask(app, "diverged", list[DivergedFile], nodes, timeout)
        return sorted((file for files in lists for file in files), key=lambda file: (file.time, file.node))

    async def difference(
        self, app: str, node: str, file: str, *, rows: int = 5, timeout: float = 120.0
    ) -> DbDifference:
        """How the database that *node* set aside in *file* differs from the present one. DatabaseError."""
        request = msgspec.json.encode(DiffRequest(file, rows))
        subject = self._client.names.database_subject(app, "diff", node)
        answer = await self._client.bus.request(subject, request, timeout=timeout)
        found = _decoded(answer, DbDifference)
        if found.error:
            raise DatabaseError(f"node {node}: {found.error}")
        return found

    async def snapshots(self, app: str) -> Snapshots:
        """What can be done with an app's snapshots by NATS alone: list, verify, delete."""
        from phalanx.data.log import WalLog
        from phalanx.data.objects import ObjectStore
        from phalanx.data.snapshots import Snapshots

        await self.check(app)
        await self._check_streams(app)
        bus, names = self._client.bus, self._client.names
        objects = ObjectStore(bus, names, app)
        return Snapshots(objects, WalLog(bus, names, app, objects), app)

    async def restoring(self, app: str) -> Restoring:
        """How a database as it was is put into a file here, by NATS alone."""
        from phalanx.data.restoring import Restoring

        return Restoring(await self.snapshots(app))

    # --- changing

    async def create_snapshot(
        self,
        app: str,
        node: str | None = None,
        *,
        on_progress: Callable[[SnapshotProgress], None] | None = None,
        timeout: float = 3600.0,
    ) -> str:
        """Have *node* (default: a standby, if there is one) make a snapshot; its name.

        Raises DatabaseError when that fails, when nothing is heard of it for a while, or after *timeout*
        seconds.
        """
        await self.check(app)
        await self._check_streams(app)
        chosen = node or await self._snapshot_node(app)
        heard = asyncio.timeout(SILENT_SECONDS)
        last: list[SnapshotProgress] = []

        def is_last(message: Message) -> bool:
            try:
                progress = _decoded(message, SnapshotProgress)
            except DatabaseError as error:
                progress = SnapshotProgress(error=str(error))
            last[:] = [progress]
            heard.reschedule(asyncio.get_running_loop().time() + SILENT_SECONDS)
            if on_progress is not None:
                on_progress(progress)
            return progress.is_last

        subject = self._client.names.database_subject(app, "snapshot", chosen)
        data = msgspec.json.encode(SnapshotRequest(caller()))
        with contextlib.suppress(TimeoutError):
            async with heard:
                await self._client.bus.gather(subject, data, timeout=timeout, most=1_000_000, is_last=is_last)
        if not last:
            raise DatabaseError(f"node {chosen} does not answer", "see: phalanx db status")
        if last[0].error:
            raise DatabaseError(f"node {chosen}: {last[0].error}")
        if not last[0].name:
            raise DatabaseError(f"node {chosen} has stopped to answer", "see: phalanx snapshot list")
        return last[0].name

    async def restore_in_place(
        self, app: str, request: RestoreRequest, *, timeout: float = 600.0
    ) -> Restored:
        """Have the app's next active node put the database back to what *request* says; waits for it.

        The app stops meanwhile. Raises DatabaseError when that fails or takes longer than *timeout*
        seconds (then it is called off), StepDownFailed when the active node does not step down, Paused.
        """
        await self.check(app)
        await self._client.check_not_paused(app)
        await self._check_streams(app)
        began, deadline = system.now(), system.now() + timeout
        outcome: list[AuditEntry] = []
        subscription = await self._client.bus.subscribe(
            self._client.names.audit_subject("app", "*"), lambda message: _note(outcome, app, message)
        )
        try:
            revision = await self._ask_for_restore(app, request, timeout + CALLED_OFF_SECONDS)
            try:
                await self._step_down(app, deadline - system.now())
                node, epoch = await self._restored(app, revision, outcome, deadline)
            except BaseException:
                await self._call_off(app, revision)
                raise
        finally:
            await subscription.unsubscribe()
        reason = outcome[-1].reason if outcome else ""
        return Restored(app=app, node=node, epoch=epoch, seconds=system.now() - began, reason=reason)

    async def _ask_for_restore(self, app: str, request: RestoreRequest, seconds: float) -> int:
        """Its revision. It is over after *seconds*, should nobody be left to call it off."""
        bus, names = self._client.bus, self._client.names
        bucket = names.app_bucket(app)
        subject = names.key_subject(bucket, RESTORE_KEY)
        there = await bus.read(names.bucket_stream(bucket), subject)
        under_way = DatabaseError("a restore of this app is under way already", "wait for its end")
        if there is not None and not there.removed:
            raise under_way
        data = msgspec.json.encode(msgspec.structs.replace(request, by=request.by or caller()))
        try:
            expect = there.revision if there is not None else 0
            return await bus.write(subject, data, expect=expect, ttl_seconds=seconds)
        except WrongRevision:
            raise under_way from None

    async def _call_off(self, app: str, revision: int) -> None:
        """Remove the request, unless a node has done so: it must not strike some other day."""
        names = self._client.names
        subject = names.key_subject(names.app_bucket(app), RESTORE_KEY)
        with contextlib.suppress(WrongRevision):
            await self._client.bus.write(subject, expect=revision, headers={"KV-Operation": "DEL"})

    async def _step_down(self, app: str, timeout: float) -> None:
        try:
            await self._client.step_down(app, reason="a restore in place", timeout=timeout, wait=False)
        except StepDownFailed:
            if await self._active(app, Role.ACTIVE, Role.ACTIVATING) is not None:
                raise  # else the next one that becomes active does it

    async def _restored(
        self, app: str, revision: int, outcome: list[AuditEntry], deadline: float
    ) -> tuple[str, int]:
        bus, names = self._client.bus, self._client.names
        bucket = names.app_bucket(app)
        while True:
            if outcome and outcome[-1].action == RESTORE_FAILED:
                raise DatabaseError(f"app {app!r}: {outcome[-1].reason}")
            key = await bus.read(names.bucket_stream(bucket), names.key_subject(bucket, RESTORE_KEY))
            if key is None or key.removed or key.revision != revision:
                active = await self._active(app, Role.ACTIVE)
                if active is not None and active[1] > revision:  # epochs are revisions of the same bucket
                    return active
            if system.now() >= deadline:
                raise DatabaseError(
                    f"app {app!r}: the restore has not ended in time and was called off",
                    "see: phalanx audit, phalanx status",
                )
            await asyncio.sleep(_POLL_SECONDS)

    # --- small things

    async def check(self, app: str) -> None:
        """Raises ConfigError for an app without a database."""
        await self._client.check_app(app)
        if app not in await self._client.databases_made():
            raise ConfigError("app", app, "has no database", "declare one: database = ...")

    async def _check_streams(self, app: str) -> None:
        for gone in await self._gone(app):
            raise gone

    async def _gone(self, app: str) -> list[StreamGone]:
        """The streams of the app's database that do not exist any more."""
        bus, names = self._client.bus, self._client.names
        gone: list[StreamGone] = []
        for stream in (names.wal_stream(app), names.object_stream(names.snapshots_bucket(app))):
            try:
                await check_there(bus, stream)
            except StreamGone as error:
                gone.append(error)
        return gone

    async def _nodes(self, app: str) -> list[str]:
        """The live nodes with that app."""
        await self.check(app)
        return [view.node for view in await self._client.nodes() if view.is_live and app in view.apps]

    async def _ask(self, app: str, action: str, kind: Any, nodes: Sequence[str], timeout: float) -> list[Any]:
        if not nodes:
            return []
        subject = self._client.names.database_subject(app, action)
        answers = await self._client.bus.gather(subject, timeout=timeout, most=len(nodes))
        return [_decoded(answer, kind) for answer in answers]

    async def _snapshot_node(self, app: str) -> str:
        """The best standby, else the active node."""
        view = await self.status(app)
        able = [node for node in view.nodes if node.role in ("following", "live")]
        if not able:
            raise DatabaseError(f"app {app!r}: no node can make a snapshot now", "see: phalanx db status")
        return min(able, key=lambda node: (node.role == "live", node.lag_records, node.node)).node

    async def _active(self, app: str, *roles: Role) -> tuple[str, int] | None:
        """The active node and its epoch; of two the one with the higher epoch."""
        found = [
            (status.epoch, view.node)
            for view in await self._client.nodes()
            if view.status is not None
            for status in view.status.apps
            if status.name == app and status.role in roles
        ]
        if not found:
            return None
        epoch, node = max(found)
        return node, epoch


def _decoded(message: Message, kind: Any) -> Any:
    try:
        return msgspec.json.decode(message.data, type=kind)
    except ValueError as error:
        raise DatabaseError(
            f"an answer on {message.subject} is not understood: {error}", "do all nodes run this version?"
        ) from None


def _note(outcome: list[AuditEntry], app: str, message: Message) -> None:
    with contextlib.suppress(ValueError):
        entry = msgspec.json.decode(message.data, type=AuditEntry)
        if entry.app == app and entry.action in (RESTORED, RESTORE_FAILED):
            outcome.append(entry)


def _by_position(answers: Iterable[DbVerified]) -> list[list[DbVerified]]:
    groups: dict[object, list[DbVerified]] = {}
    for answer in answers:
        if answer.fingerprint:
            groups.setdefault(answer.position, []).append(answer)
    return list(groups.values())


def _differences(group: Sequence[DbVerified]) -> list[str]:
    """What is wrong with databases of one position, if they are not all the same."""
    if len({answer.fingerprint for answer in group}) == 1:
        return []
    names = ", ".join(f"{answer.node} ({answer.fingerprint[:12]})" for answer in group)
    return [f"different databases at position {group[0].position}: {names}"]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


__all__ = ["DatabaseClient", "DatabaseView", "Restored", "Verification"]
