"""Warming up: the next owner of a partition gets ready for it while the present one still serves it.

The present owner asks the node that the plan names, and waits for its answer within the deadline of
``on_prepare`` before it releases. Whatever goes wrong with that is reported by who prepares, and is no reason
to keep the partition: nothing depends on it but time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from phalanx.aio import Background
from phalanx.app.owning import PartitionHook
from phalanx.coord.kv import AppKV
from phalanx.errors import BusError, HookFailed
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription

log = logging.getLogger("phalanx.hooks")

ANSWER_SECONDS = 1.0
"""What the answer may take besides the hook."""

MOST_WAITING = 4096
"""Partitions that wait here to be prepared; others are not."""

_number_of = msgspec.json.Decoder(int).decode


class PrepareContext:
    """What ``on_prepare`` gets besides the partition. There is no epoch: it belongs to another node yet."""

    def __init__(self, app: str, node: str, partition: int, kv: AppKV) -> None:
        self.app, self.node, self.partition, self.kv = app, node, partition, kv


class Preparing:
    """Both sides of one app on one node: :meth:`open` to answer others, :meth:`ask` before releasing.

    *seconds*: the deadline of *hook*, of which *most_at_once* run side by side. *on_failed* is told of the
    partition, and of what was wrong.
    """

    def __init__(
        self,
        app: str,
        node: str,
        hook: PartitionHook,
        bus: Bus,
        names: Names,
        *,
        seconds: float,
        most_at_once: int,
        on_failed: Callable[[int, HookFailed], None],
    ) -> None:
        self._app, self._node, self._hook = app, node, hook
        self._bus, self._names, self._seconds = bus, names, seconds
        self._turns, self._questions = asyncio.Semaphore(most_at_once), asyncio.Semaphore(most_at_once)
        self._on_failed = on_failed
        self._kv = AppKV(bus, names, app)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._background = Background(log)
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Begin to prepare what others are about to release. Raises BusError."""
        subject = self._names.ring_prepare_subject(self._app, self._node)
        self._subscription = await self._bus.subscribe(subject, self._on_request)

    async def close(self) -> None:
        """Prepare no more; nothing of it runs afterwards."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        await self._background.close()

    # --- the next owner

    def _on_request(self, message: Message) -> None:
        try:
            partition = _number_of(message.data)
        except msgspec.MsgspecError as error:
            log.warning("app %s: a request to prepare that is none: %s", self._app, error)
            return
        if partition in self._running or len(self._running) >= MOST_WAITING:
            return
        work = self._prepare(partition, message)
        task = self._running[partition] = self._background.spawn(work, f"{self._app} prepares")
        task.add_done_callback(lambda ended: self._running.pop(partition, None))

    async def _prepare(self, partition: int, message: Message) -> None:
        async with self._turns:
            problem = ""
            try:
                async with asyncio.timeout(self._seconds):
                    await self._hook(partition, PrepareContext(self._app, self._node, partition, self._kv))
            except TimeoutError:
                problem = f"overran its deadline of {self._seconds:g} s"
            except Exception as error:
                log.error("app %s: on_prepare of partition %d", self._app, partition, exc_info=error)
                problem = f"failed: {type(error).__name__}: {error}"
        if problem:
            what = f"of partition {partition} {problem}"
            self._on_failed(partition, HookFailed(self._app, "on_prepare", what))
        try:
            await self._bus.publish(message.reply)
        except BusError as error:
            log.debug(
                "app %s: partition %d is prepared, which cannot be said: %s", self._app, partition, error
            )

    async def end(self, partition: int) -> None:
        """It is owned here now: what still prepares it ends first, as only one hook of a partition runs."""
        task = self._running.get(partition)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- the present owner

    async def ask(self, partition: int, node: str) -> None:
        """Have *node* get ready for *partition*; returns when it is, or need not be waited for."""
        async with self._questions:
            subject = self._names.ring_prepare_subject(self._app, node)
            timeout = self._seconds + ANSWER_SECONDS
            try:
                await self._bus.request(subject, msgspec.json.encode(partition), timeout=timeout)
            except BusError as error:
                log.info("app %s: partition %d goes to %s unprepared: %s", self._app, partition, node, error)


__all__ = ["PrepareContext", "Preparing"]
