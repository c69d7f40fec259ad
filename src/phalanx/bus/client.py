"""nats-py's client, where it does otherwise than we need: what is broken is dropped, steps are bounded, and
messages are sent and taken without a future, a queue and a task for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar, cast

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionClosedError, OutboundBufferLimitError
from nats.errors import Error as NatsError

from phalanx.bus.protocol import Direct, MessageParser, read_header_lines, write_headers, write_message

log = logging.getLogger("phalanx.nats")

T = TypeVar("T")


class NatsClient(Client):
    """nats-py's client that drops a broken transport at once."""

    def __init__(self, on_broken: Callable[[], None]) -> None:
        super().__init__()
        self._on_broken = on_broken
        self.was_connected = False
        self._ps = self._parser = MessageParser(self)
        self.loop = asyncio.get_running_loop()
        self._is_writing = False
        self._headers, self._head = dict[str, str](), b""
        """Those that were sent last, and their block: of answers they are often all alike."""

    # --- sending

    def send(
        self, subject: str, data: bytes = b"", reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish: with all else that is sent at this moment, in order. Raises nats-py's errors."""
        if self._status != NatsClient.CONNECTED:
            raise ConnectionClosedError if self.is_closed else OutboundBufferLimitError
        head = b""
        if headers:
            if headers != self._headers:
                self._head = write_headers(headers)
                self._headers = dict(headers)
            head = self._head
        self._pending.append(write_message(subject, reply, data, head, self._max_payload))
        if not self._is_writing:
            self._is_writing = True
            self.loop.call_soon(self._write_pending)

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See :meth:`send`."""
        self.send(subject, payload, reply, headers)

    def _write_pending(self) -> None:
        self._is_writing = False
        if not self._pending or not self.is_connected:
            return
        commands, self._pending, self._pending_data_size = self._pending, [], 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            try:
                writer.transport.write(b"".join(commands))
            except (OSError, RuntimeError) as error:
                # The connection is gone (uvloop: RuntimeError): whoever reads from it finds that.
                log.debug("nats: writing: %s", error)

    async def _flush_pending(self, force_flush: bool = False) -> None:
        self._write_pending()

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        self._write_pending()  # else the answer to this ping would say nothing of what was sent before
        untyped: Any = super()
        await untyped._send_ping(future)

    async def _process_pong(self) -> None:
        untyped: Any = self
        waiting: list[asyncio.Future[Any]] = untyped._pongs
        if waiting and waiting[0].done():
            # Whoever waited for it has given up: nats-py would raise, and read nothing any more.
            waiting.pop(0)
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    # --- taking

    async def subscribe_directly(self, subject: str, queue: str, direct: Direct) -> Subscription:
        """Have *direct* take each message as it is read. Raises nats-py's errors."""
        untyped: Any = self
        subscription: Any = await untyped.subscribe(subject, queue=queue)
        self._parser.direct[subscription._id] = direct
        return cast("Subscription", subscription)

    async def drain_subscription(self, subscription: Subscription) -> None:
        """Have the server send nothing more for it, and return when all that it has sent is taken.

        It is to be ended then, also if this fails or is cancelled: else the next connection brings it back.
        Raises nats-py's errors.
        """
        untyped: Any = self
        inner: Any = subscription
        await untyped._send_unsubscribe(inner._id)
        answered: asyncio.Future[Any] = self.loop.create_future()
        await self._send_ping(answered)
        await answered
        await inner._pending_queue.join()

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._parser.direct.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    # --- what breaks

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
        return read_header_lines(raw.decode("utf-8", "replace"), {})

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
