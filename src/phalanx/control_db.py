"""What a node answers over NATS about the databases of its apps: the other end of ``phalanx db``.

Like ``control``: whoever may publish on these subjects may do this.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phalanx.aio import Background
from phalanx.data.inspection import status_of, verify
from phalanx.errors import PhalanxError
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.control")

PROGRESS_SECONDS, QUIET_PROGRESS_SECONDS = 0.2, 5.0
"""Between two messages about how far a snapshot is."""


class DatabaseControl:
    """Answers for one app's database, while it is there."""

    def __init__(self, bus: Bus, names: Names, node: str, database: AppDatabase) -> None:
        self._bus, self._names, self._node, self._database = bus, names, node, database
        self._subscriptions: list[Subscription] = []
        self._background = Background(log)
        self._busy = False

    async def start(self) -> None:
        """Begin to answer."""
        everybody: dict[str, Callable[[Message], Awaitable[None]]] = {
            "status": self._on_status,
            "verify": self._on_verify,
            "diverged": self._on_diverged,
            "diff": self._on_diff,
            "snapshot": self._on_snapshot,
        }
        for action, answer in everybody.items():

            def spawn(message: Message, action: str = action, answer: object = answer) -> None:
                # Some take long: other messages must not wait for them.
                self._background.spawn(answer(message), f"{self._database.app} db {action}")  # type: ignore[operator]

            for node in (None, self._node):
                subject = self._names.database_subject(self._database.app, action, node)
                self._subscriptions.append(await self._bus.subscribe(subject, spawn))

    async def stop(self) -> None:
        """No longer answer."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await self._background.close()

    async def _on_status(self, message: Message) -> None:
        await self._answer(message, await status_of(self._database))

    async def _on_verify(self, message: Message) -> None:
        await self._answer(message, await verify(self._database))

    async def _on_diverged(self, message: Message) -> None:
        await self._answer(message, [each.listed() for each in self._database.settlements.diverged()])

    async def _on_diff(self, message: Message) -> None:
        from phalanx.data.difference import difference
        from phalanx.data.status import DbDifference, DiffRequest

        file = ""
        try:
            request = msgspec.json.decode(message.data, type=DiffRequest)
            file = request.file
            if file not in {each.file for each in self._database.settlements.diverged()}:
                raise ValueError("it was not set aside on this node; see: phalanx db diverged")
            present = self._database.readable_path()
            tables = await asyncio.to_thread(difference, Path(file), present, rows=request.rows)
            answer = DbDifference(node=self._node, file=file, tables=tables)
        except (PhalanxError, ValueError, OSError) as error:
            answer = DbDifference(node=self._node, file=file, error=str(error))
        await self._answer(message, answer)

    async def _on_snapshot(self, message: Message) -> None:
        from phalanx.data.status import SnapshotProgress, SnapshotRequest

        loop = asyncio.get_running_loop()
        told_at, request = 0.0, SnapshotRequest()

        def progress(done: int, total: int) -> None:
            nonlocal told_at
            pause = QUIET_PROGRESS_SECONDS if request.quiet else PROGRESS_SECONDS
            if loop.time() - told_at >= pause:
                told_at = loop.time()
                told = SnapshotProgress(done_bytes=done, total_bytes=total)
                self._background.spawn(self._answer(message, told), "snapshot progress")

        try:
            request = msgspec.json.decode(message.data or b"{}", type=SnapshotRequest)
            made = await self._database.make_snapshot(
                kind=request.kind, note=f"asked by {request.by}", progress=progress
            )
            last = SnapshotProgress(name=made.name, done_bytes=made.raw_bytes, total_bytes=made.raw_bytes)
        except (PhalanxError, ValueError, OSError) as error:
            last = SnapshotProgress(error=str(error))
        await self._answer(message, last)

    async def _answer(self, message: Message, answer: object) -> None:
        if not self._names.takes_answers(message.reply):
            return
        try:
            await self._bus.publish(message.reply, msgspec.json.encode(answer))
        except PhalanxError as error:
            log.warning("an answer on %s could not be sent: %s", message.subject, error)
