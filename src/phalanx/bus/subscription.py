"""A subscription that outlives the client that it was made on."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from phalanx.bus.client import NatsClient, subscribe
from phalanx.bus.jetstream import message_of
from phalanx.ports import Message

log = logging.getLogger("phalanx.nats")


class BusSubscription:
    """One subscription, across replacements of the client."""

    def __init__(
        self,
        subject: str,
        queue: str,
        on_message: Callable[[Message], Awaitable[None] | None],
        on_ended: Callable[[BusSubscription], None],
        *,
        direct: bool = False,
    ) -> None:
        self.subject, self.queue, self._on_message, self._on_ended = subject, queue, on_message, on_ended
        self._direct = direct
        self._inner: Subscription | None = None
        self._client: NatsClient | None = None
        self._ended = False

    async def attach(self, client: NatsClient) -> None:
        """Have it on *client* from now on. Raises nats-py's errors."""
        if self._ended or self._client is client:
            return  # ended meanwhile, or attached by whoever subscribed while the client was being made
        self._client = client
        try:
            if self._direct:
                inner = await client.subscribe_directly(self.subject, self.queue, self._take)
            else:
                inner = await subscribe(client, self.subject, self._deliver, queue=self.queue)
        except BaseException:
            self._client = None
            raise
        self._inner = inner
        if self._ended:
            await self.unsubscribe()

    def _take(self, message: Message) -> None:
        self._on_message(message)

    async def _deliver(self, msg: Msg) -> None:
        try:
            done = self._on_message(message_of(msg))
            if inspect.isawaitable(done):
                await done
        except Exception:
            log.exception("a message on %s could not be handled", msg.subject)

    async def drain(self, timeout: float) -> None:
        """See ports.Subscription."""
        inner, client = self._inner, self._client
        try:
            if inner is not None and client is not None and client.is_connected:
                with contextlib.suppress(NatsError, TimeoutError):
                    async with asyncio.timeout(timeout):
                        await client.drain_subscription(inner)
        finally:
            await self.unsubscribe()

    async def unsubscribe(self) -> None:
        """End it; twice is harmless."""
        self._ended = True
        inner, self._inner = self._inner, None
        self._on_ended(self)
        if inner is not None:
            with contextlib.suppress(NatsError):
                await inner.unsubscribe()


__all__ = ["BusSubscription"]
