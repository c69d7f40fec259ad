"""nats-py's client, where it does otherwise than we need: what is broken is dropped, steps are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

T = TypeVar("T")


class NatsClient(Client):
    """nats-py's client that drops a broken transport at once."""

    def __init__(self, on_broken: Callable[[], None]) -> None:
        super().__init__()
        self._on_broken = on_broken
        self.was_connected = False

    async def _process_op_err(self, e: Exception) -> None:
        if self.is_connected:
            self.abort()
            self._on_broken()
        await super()._process_op_err(e)

    async def _connect_to_server(self, s: Any) -> None:
        # A server that took the connection but never spoke: nats-py would leave that socket open.
        self.abort()
        await super()._connect_to_server(s)
        if self.is_closed:
            # Closed meanwhile, but Python 3.11's wait_for swallows a cancellation that comes with the result.
            self.abort()
            raise asyncio.CancelledError

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """What nats-py's does, without its look at each character, which took as long as all else."""
        headers: dict[str, str] = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            name = name.strip()
            if colon and name.isascii() and name.split() == [name]:
                headers[name] = value.strip()
        return headers

    async def leave(self) -> None:
        """Reconnect to the next server of the pool; to this one only after all others were tried."""
        await self._process_op_err(NatsError("leaving this server"))

    def abort(self) -> None:
        """Close the transport without waiting for anything; what was not sent yet is dropped.

        SUB commands among that are harmless to drop: a reconnection sends all subscriptions anew.
        """
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


async def bounded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Wait for *work* within *seconds*, else TimeoutError. Never longer: nats-py swallows cancellations
    in places, so that neither wait_for() nor timeout() would be a bound."""
    task = asyncio.create_task(work, name="nats bounded")
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(seen)
    if not task.done():
        raise TimeoutError(f"not done within {seconds:g} s")
    return task.result()


def seen(task: asyncio.Task[Any]) -> None:
    """Whatever becomes of an abandoned task: it is not reported as an error that nobody saw."""
    if not task.cancelled():
        task.exception()


async def subscribe(
    client: Client, subject: str, on_message: Callable[[Msg], Awaitable[None]], *, queue: str = ""
) -> Subscription:
    """nats-py's ``subscribe``, with types. Raises nats-py's errors."""
    untyped: Any = client  # parts of this method's types are unknown in nats-py
    return cast("Subscription", await untyped.subscribe(subject, queue=queue, cb=on_message))


__all__ = ["NatsClient", "bounded", "seen", "subscribe"]
