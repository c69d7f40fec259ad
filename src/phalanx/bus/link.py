"""One connection to NATS that comes back: its client, its subscriptions, and who is told of its changes.

What nats-py does differently from what we promise, and how it is bridged here and in :mod:`.client`:

* It keeps what was published while disconnected and sends it later. A compare-and-set must not arrive
  long after it was decided: nothing is sent while disconnected, and what was queued when the
  connection broke is dropped.
* It waits for a broken transport to close in an orderly way, which with TLS over a pulled cable takes
  half a minute: the transport is aborted.
* A request on a connection that broke is not answered any more, but only its timeout tells: here it
  fails at once (outcome unknown).
* Some errors of the server (authorization, among them during its restart) close the client for good:
  here a new one is made, and all subscriptions with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError

from phalanx.bus.client import NatsClient, bounded, seen
from phalanx.bus.login import is_refusal, login, plain, remedy, tls, without_login
from phalanx.bus.requests import Requests
from phalanx.bus.subscription import BusSubscription
from phalanx.config.node import NatsOptions
from phalanx.errors import BusError, NatsUnusable
from phalanx.ports import Connection, Message

log = logging.getLogger("phalanx.nats")

RECONNECT_SECONDS = 0.05
REOPEN_SECONDS = (0.2, 5.0)
"""First and longest delay between tries to replace a client that the server closed for good."""

OPEN_SECONDS = 10.0
WEDGED_SECONDS = 15.0
"""A client that has not reconnected after this long is replaced by a new one."""


class NatsLink:
    """The connection. ``client`` is the present one: it may be replaced at any time.

    *requests* are those under way: they get each new client, and fail when a connection breaks.
    """

    def __init__(self, options: NatsOptions, name: str, ping_interval: float, requests: Requests) -> None:
        self._options, self._name, self._ping_interval = options, name, ping_interval
        self._requests = requests
        self._subscriptions: set[BusSubscription] = set()
        self._listeners: list[Callable[[Connection], None]] = []
        self._missed_at = float("-inf")
        self._closing = False
        self._reopening: asyncio.Task[None] | None = None
        self._last_error: Exception | None = None
        self._refused: asyncio.Future[Exception] | None = None
        self.client = NatsClient(self._on_broken)

    async def open(self, timeout: float) -> None:
        """Connect, within *timeout* seconds. Raises NatsUnusable, with what the servers answered."""
        self._refused = refused = asyncio.get_running_loop().create_future()
        opening = asyncio.create_task(self._open(), name="nats connect")
        try:
            await asyncio.wait({opening, refused}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if opening.done() and opening.exception() is None:
                return
            error = opening.exception() if opening.done() else self._last_error
            if refused.done():
                # The server closes the connection after its refusal: what follows says nothing.
                error = refused.result()
        finally:
            self._refused = None
            if not opening.done() or opening.exception() is not None:
                self._closing = True
                opening.cancel()
                opening.add_done_callback(seen)
                await self.close()
        where = ", ".join(without_login(url) for url in self._options.urls)
        raise NatsUnusable(
            f"cannot connect to NATS at {where}: {plain(error)}", remedy(error, timeout)
        ) from error

    async def _open(self) -> None:
        client = NatsClient(self._on_broken)
        self.client = client
        urls = list(self._options.urls)
        random.shuffle(urls)
        await client.connect(
            urls,
            # Shuffled once, above. nats-py would do it at each reconnection too, and so, one in three times,
            # try the server that it has just given up: that costs the timeout of a connection.
            dont_randomize=True,
            name=self._name,
            error_cb=self._on_error,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,  # pyright: ignore[reportArgumentType]
            connect_timeout=max(0.5, min(2.0, 2 * self._ping_interval)),  # pyright: ignore[reportArgumentType]
            ping_interval=self._ping_interval,  # pyright: ignore[reportArgumentType]
            max_outstanding_pings=2,
            pending_size=0,  # nothing is kept while disconnected, and no publish waits for a stuck flush
            **login(self._options),
            **tls(self._options),
        )
        client.was_connected = True
        await self._requests.attach(client)
        for subscription in list(self._subscriptions):
            await subscription.attach(client)
        await client.flush(timeout=2)

    async def close(self) -> None:
        """End the connection; requests under way fail. Bounded, also when the servers hang."""
        self._closing = True
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        client = self.client
        if client.is_connected:
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await bounded(client.flush(timeout=1), 2)
        await self._dispose(client)
        self._requests.fail("the connection was closed")
        self._tell(Connection.CLOSED)

    async def _dispose(self, client: NatsClient) -> None:
        client.abort()
        try:
            await bounded(client.close(), 2)
        except Exception as error:
            # Whatever a broken client says at its end (uvloop: RuntimeError) must not stop its successor.
            log.debug("nats: closing: %s", plain(error))

    # --- what happens to the connection

    def _on_broken(self) -> None:
        self._requests.fail("the connection broke")
        self._tell(Connection.DISCONNECTED)
        if not self._closing:
            loop = asyncio.get_running_loop()
            loop.call_later(WEDGED_SECONDS, self._replace_if_wedged, self.client)

    def _replace_if_wedged(self, client: NatsClient) -> None:
        """A reconnection that does not come about although it is tried: begin anew, with a fresh client."""
        if client is self.client and not client.is_connected and not self._closing:
            self._start_reopening(f"no reconnection within {WEDGED_SECONDS:g} s")

    def _start_reopening(self, why: str) -> None:
        if self._reopening is not None and not self._reopening.done():
            return
        log.warning("nats: %s; a new client is made", why)
        self._reopening = asyncio.create_task(self._reopen(), name="nats reopen")

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        # A message that is dropped here was acknowledged by nobody, but who waits for it should know why.
        level = logging.WARNING if isinstance(error, SlowConsumerError) else logging.DEBUG
        log.log(level, "nats: %s", plain(error))
        refused = self._refused
        if refused is not None and not refused.done() and is_refusal(error):
            refused.set_result(error)

    async def _on_reconnected(self) -> None:
        self._tell(Connection.CONNECTED)

    async def _on_closed(self) -> None:
        if self._closing or (self._reopening is not None and not self._reopening.done()):
            return  # on purpose, or a client that is being replaced
        self._on_broken()
        self._start_reopening(f"the server ended the connection for good ({plain(self._last_error)})")

    async def _reopen(self) -> None:
        delay, longest = REOPEN_SECONDS
        while not self._closing:
            await self._dispose(self.client)
            try:
                await bounded(self._open(), OPEN_SECONDS)
            except Exception as error:
                # Whatever it is, such as a certificate that is just being replaced: it must not be the end.
                log.warning("nats: not connected: %s", plain(self._last_error or error))
                await asyncio.sleep(delay)
                delay = min(longest, 2 * delay)
                continue
            self._tell(Connection.CONNECTED)
            return

    def _tell(self, event: Connection) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener for connection changes failed")

    async def subscribe(
        self,
        subject: str,
        on_message: Callable[[Message], Awaitable[None] | None],
        queue: str,
        *,
        direct: bool = False,
    ) -> BusSubscription:
        """See :meth:`phalanx.ports.Bus.subscribe`."""
        subscription = BusSubscription(subject, queue, on_message, self._subscriptions.discard, direct=direct)
        self._subscriptions.add(subscription)
        client = self.client
        if not client.was_connected:
            return subscription  # it is being made, and takes this subscription with the others
        try:
            await subscription.attach(client)
        except NatsError as error:
            if self._closing or not self.client.is_closed:
                self._subscriptions.discard(subscription)
                raise BusError(f"subscribe {subject}", plain(error)) from error
            # The client is being replaced; the new one takes this subscription with the others.
        return subscription

    # --- what others are told, and know

    def missed(self) -> None:
        """See :meth:`phalanx.ports.Bus.missed`."""
        now = asyncio.get_running_loop().time()
        if now - self._missed_at >= 1.0:
            self._missed_at = now
            self._tell(Connection.MISSED)

    async def switch_server(self, why: str) -> None:
        """See :meth:`phalanx.ports.Bus.switch_server`."""
        client = self.client
        if client.is_connected:
            log.warning("nats: leaving server %s: %s", self.server_name, why)
            await client.leave()

    def on_connection(self, callback: Callable[[Connection], None]) -> Callable[[], None]:
        """Be told of connection changes; returns a function that ends this."""
        self._listeners.append(callback)

        def stop() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return stop

    @property
    def server_name(self) -> str:
        """The server this client is connected to at present, empty when it is not."""
        return str(self.info.get("server_name", "")) if self.client.is_connected else ""

    @property
    def info(self) -> dict[str, Any]:
        """What the connected (or last connected) server says of itself."""
        return cast("dict[str, Any]", getattr(self.client, "_server_info", None) or {})

    @property
    def last_error(self) -> str:
        """What the server complained of last, such as a missing permission; empty if of nothing."""
        return plain(self._last_error) if self._last_error is not None else ""


__all__ = ["NatsLink"]
