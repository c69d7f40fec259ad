"""The bus over nats-py: everything that :class:`phalanx.ports.Bus` promises.

What nats-py does differently from what we promise, and how it is bridged here:

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
import base64
import contextlib
import inspect
import itertools
import logging
import math
import random
import secrets
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.errors import Error as NatsError

from phalanx.config.node import NatsOptions
from phalanx.errors import BusError, BusTimeout, BusUnavailable, NatsUnusable, WrongRevision
from phalanx.names import FENCE_KEY, LEADER_KEY
from phalanx.ports import (
    BATCH_INCOMPLETE,
    BATCHES_UNDER_WAY,
    Connection,
    Fence,
    Message,
    Record,
    Write,
    is_removed,
)

log = logging.getLogger("phalanx.nats")

T = TypeVar("T")

WRONG_LAST_SEQUENCE = (10071, 10164)
"""JSStreamWrongLastSequenceErrF, and its constant form: another compare-and-set is under way."""

NO_MESSAGE_FOUND = 10037
UNANSWERED_BYTES = 1 << 20
"""How much of a batch is sent before the server has to answer once: what is on its way stays bounded."""

RECONNECT_SECONDS = 0.05
REOPEN_SECONDS = (0.2, 5.0)
"""First and longest delay between tries to replace a client that the server closed for good."""

OPEN_SECONDS = 10.0
WEDGED_SECONDS = 15.0
"""A client that has not reconnected after this long is replaced by a new one."""


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    time: str = ""
    data: str = ""
    hdrs: str = ""


class _GetReply(msgspec.Struct):
    message: _Stored | None = None
    error: _Error | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode
_decode_get = msgspec.json.Decoder(_GetReply).decode
_decode_any = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class _Client(Client):
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


class _Subscription:
    """One subscription, across replacements of the client."""

    def __init__(
        self,
        subject: str,
        queue: str,
        on_message: Callable[[Message], Awaitable[None] | None],
        on_ended: Callable[[_Subscription], None],
    ) -> None:
        self.subject, self.queue, self._on_message, self._on_ended = subject, queue, on_message, on_ended
        self._inner: NatsSubscription | None = None
        self._client: Client | None = None
        self._ended = False

    async def attach(self, client: Client) -> None:
        if self._ended or self._client is client:
            return  # ended meanwhile, or attached by whoever subscribed while the client was being made
        self._client = client
        try:
            inner = await _subscribe(client, self.subject, self._deliver, queue=self.queue)
        except BaseException:
            self._client = None
            raise
        self._inner = inner
        if self._ended:
            await self.unsubscribe()

    async def _deliver(self, msg: Msg) -> None:
        try:
            done = self._on_message(_message(msg))
            if inspect.isawaitable(done):
                await done
        except Exception:
            log.exception("a message on %s could not be handled", msg.subject)

    async def unsubscribe(self) -> None:
        self._ended = True
        inner, self._inner = self._inner, None
        self._on_ended(self)
        if inner is not None:
            with contextlib.suppress(NatsError):
                await inner.unsubscribe()


class NatsBus:
    """One connection to NATS. Make it with :meth:`connect`, end it with :meth:`close`."""

    def __init__(self, options: NatsOptions, name: str, ping_interval: float) -> None:
        self._options, self._name, self._ping_interval = options, name, ping_interval
        self._subscriptions: set[_Subscription] = set()
        self._listeners: list[Callable[[Connection], None]] = []
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._gathering: set[asyncio.Future[str]] = set()
        self._tokens = itertools.count(1)
        self._inbox = ""
        self._missed_at = float("-inf")
        self._closing = False
        self._reopening: asyncio.Task[None] | None = None
        self._last_error: Exception | None = None
        self._refused: asyncio.Future[Exception] | None = None
        self._client = _Client(self._on_broken)

    @classmethod
    async def connect(
        cls, options: NatsOptions, *, name: str = "phalanx", ping_interval: float = 1.0, timeout: float = 10.0
    ) -> NatsBus:
        """Connect, within *timeout* seconds. Raises NatsUnusable, with what the servers answered.

        A server that does not answer pings for three *ping_interval* seconds is given up for another.
        """
        bus = cls(options, name, ping_interval)
        bus._refused = asyncio.get_running_loop().create_future()
        opening = asyncio.create_task(bus._open(), name="nats connect")
        try:
            await asyncio.wait({opening, bus._refused}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if opening.done() and opening.exception() is None:
                return bus
            error = opening.exception() if opening.done() else bus._last_error
            if bus._refused.done():
                # The server closes the connection after its refusal: what follows says nothing.
                error = bus._refused.result()
        finally:
            bus._refused = None
            if not opening.done() or opening.exception() is not None:
                bus._closing = True
                opening.cancel()
                opening.add_done_callback(_seen)
                await bus.close()
        where = ", ".join(_without_login(url) for url in options.urls)
        raise NatsUnusable(
            f"cannot connect to NATS at {where}: {_plain(error)}", _remedy(error, timeout)
        ) from error

    async def _open(self) -> None:
        client = _Client(self._on_broken)
        self._client = client
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
            **_login(self._options),
            **_tls(self._options),
        )
        client.was_connected = True
        self._inbox = client.new_inbox()
        await _subscribe(client, f"{self._inbox}.*", self._on_reply)
        for subscription in list(self._subscriptions):
            await subscription.attach(client)
        await client.flush(timeout=2)

    async def close(self) -> None:
        """End the connection; requests under way fail. Bounded, also when the servers hang."""
        self._closing = True
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        client = self._client
        if client.is_connected:
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await _bounded(client.flush(timeout=1), 2)
        await self._dispose(client)
        self._fail_requests("the connection was closed")
        self._tell(Connection.CLOSED)

    async def _dispose(self, client: _Client) -> None:
        client.abort()
        try:
            await _bounded(client.close(), 2)
        except Exception as error:
            # Whatever a broken client says at its end (uvloop: RuntimeError) must not stop its successor.
            log.debug("nats: closing: %s", _plain(error))

    # --- what happens to the connection

    def _on_broken(self) -> None:
        self._fail_requests("the connection broke")
        self._tell(Connection.DISCONNECTED)
        if not self._closing:
            loop = asyncio.get_running_loop()
            loop.call_later(WEDGED_SECONDS, self._replace_if_wedged, self._client)

    def _replace_if_wedged(self, client: _Client) -> None:
        """A reconnection that does not come about although it is tried: begin anew, with a fresh client."""
        if client is self._client and not client.is_connected and not self._closing:
            self._start_reopening(f"no reconnection within {WEDGED_SECONDS:g} s")

    def _start_reopening(self, why: str) -> None:
        if self._reopening is not None and not self._reopening.done():
            return
        log.warning("nats: %s; a new client is made", why)
        self._reopening = asyncio.create_task(self._reopen(), name="nats reopen")

    def _fail_requests(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        open_requests: list[asyncio.Future[Any]] = [*waiting.values(), *self._gathering]
        for future in open_requests:
            if not future.done():
                future.set_exception(BusTimeout("request", f"{why}; whether it was carried out is unknown"))

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        log.debug("nats: %s", _plain(error))
        refused = self._refused
        if refused is not None and not refused.done() and _is_refusal(error):
            refused.set_result(error)

    async def _on_reconnected(self) -> None:
        self._tell(Connection.CONNECTED)

    async def _on_closed(self) -> None:
        if self._closing or (self._reopening is not None and not self._reopening.done()):
            return  # on purpose, or a client that is being replaced
        self._on_broken()
        self._start_reopening(f"the server ended the connection for good ({_plain(self._last_error)})")

    async def _reopen(self) -> None:
        delay, longest = REOPEN_SECONDS
        while not self._closing:
            await self._dispose(self._client)
            try:
                await _bounded(self._open(), OPEN_SECONDS)
            except Exception as error:
                # Whatever it is, such as a certificate that is just being replaced: it must not be the end.
                log.warning("nats: not connected: %s", _plain(self._last_error or error))
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

    def missed(self) -> None:
        """See :meth:`phalanx.ports.Bus.missed`."""
        now = asyncio.get_running_loop().time()
        if now - self._missed_at >= 1.0:
            self._missed_at = now
            self._tell(Connection.MISSED)

    async def switch_server(self, why: str) -> None:
        """See :meth:`phalanx.ports.Bus.switch_server`."""
        client = self._client
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
    def is_connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._client.is_connected

    @property
    def server_name(self) -> str:
        """The server this client is connected to at present, empty when it is not."""
        return str(self._info.get("server_name", "")) if self.is_connected else ""

    @property
    def server_version(self) -> str:
        """The version of the connected (or last connected) server."""
        return str(self._info.get("version", ""))

    @property
    def cluster(self) -> str:
        """The cluster name of the connected server; empty where there is no cluster."""
        return str(self._info.get("cluster", ""))

    @property
    def connect_urls(self) -> tuple[str, ...]:
        """Where the servers of the cluster listen, as the connected one knows them."""
        return tuple(str(url) for url in self._info.get("connect_urls") or ())

    @property
    def last_error(self) -> str:
        """What the server complained of last, such as a missing permission; empty if of nothing."""
        return _plain(self._last_error) if self._last_error is not None else ""

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        return self._client.max_payload

    @property
    def _info(self) -> dict[str, Any]:
        return cast("dict[str, Any]", getattr(self._client, "_server_info", None) or {})

    # --- requests

    async def _on_reply(self, msg: Msg) -> None:
        future = self._waiting.pop(msg.subject.rpartition(".")[2], None)
        if future is not None and not future.done():
            future.set_result(msg)

    async def _ask(
        self, operation: str, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        """One request, one reply. Raises BusUnavailable, BusTimeout, BusError."""
        client = self._client
        if not client.is_connected:
            raise BusUnavailable(operation, "not connected to NATS")
        loop = asyncio.get_running_loop()
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = future
        timer = loop.call_later(timeout, _expire, future, operation, timeout)
        try:
            await client.publish(subject, data, reply=f"{self._inbox}.{token}", headers=headers)
            msg = await future
        except (NatsError, OSError) as error:
            raise BusError(operation, _plain(error)) from error
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
        if msg.headers is not None and not msg.data and msg.headers.get("Status") == "503":
            raise BusUnavailable(operation, "nobody answers there just now")
        return msg

    async def write(
        self,
        subject: str,
        data: bytes = b"",
        *,
        expect: int | None = None,
        fence: Fence | None = None,
        headers: Mapping[str, str] | None = None,
        ttl_seconds: float | None = None,
        timeout: float = 2.0,
    ) -> int:
        """See :meth:`phalanx.ports.Bus.write`."""
        all_headers = _write_headers(headers, ttl_seconds)
        if expect is not None:
            all_headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
            if fence is not None:
                return await self._write_batch(subject, data, expect, fence, all_headers, timeout)
        elif fence is not None:
            all_headers.update(_fence_headers(fence))
        operation = f"write {subject}"
        msg = await self._ask(operation, subject, data, all_headers or None, timeout)
        ack = _decode_ack(msg.data)
        if ack.error is not None:
            if expect is not None:
                raise _refusal(operation, ack.error, subject, expect)
            raise _refusal(
                operation, ack.error, fence.subject if fence else subject, fence.revision if fence else 0
            )
        return ack.seq

    async def _write_batch(
        self, subject: str, data: bytes, expect: int, fence: Fence, headers: dict[str, str], timeout: float
    ) -> int:
        """Key and fence in one atomic batch (ADR-50): a message may carry only one expectation.

        The fence's message is stored beside the leader key, where nobody reads it.
        """
        batch = secrets.token_hex(12)
        beside = f"{fence.subject.removesuffix(LEADER_KEY)}{FENCE_KEY}"
        first = {**_fence_headers(fence), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": "1"}
        last = {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": "2", "Nats-Batch-Commit": "1"}
        operation = f"write {subject}"
        begun = await self._ask(operation, beside, b"", first, timeout)
        if begun.data and (refused := _decode_ack(begun.data)).error is not None:
            raise _refusal(operation, refused.error, fence.subject, fence.revision)
        ack = _decode_ack((await self._ask(operation, subject, data, last, timeout)).data)
        if ack.error is not None:
            # The server does not say which of the two expectations failed: the caller looks.
            raise _refusal(operation, ack.error, "", expect)
        return ack.seq

    async def write_many(
        self, writes: Sequence[Write], *, fence: Fence | None = None, timeout: float = 2.0
    ) -> int:
        """See :meth:`phalanx.ports.Bus.write_many`."""
        batch, operation = secrets.token_hex(12), f"write {len(writes)} messages at once"
        unanswered = 0
        for number, write in enumerate(writes[:-1], 1):
            headers = _batch_headers(write, batch, number, fence)
            unanswered += len(write.data)
            # The first is answered in any case: it opens the batch, and is refused where that can't be.
            if number == 1 or unanswered >= UNANSWERED_BYTES:
                await self._ask_in_batch(operation, write, headers, fence, timeout)
                unanswered = 0
            else:
                await self._send_in_batch(operation, write, headers)
        last = writes[-1]
        headers = {**_batch_headers(last, batch, len(writes), fence), "Nats-Batch-Commit": "1"}
        ack = _decode_ack((await self._ask(operation, last.subject, last.data, headers, timeout)).data)
        if ack.error is not None:
            raise _batch_refusal(operation, ack.error, fence)
        return ack.seq

    async def _ask_in_batch(
        self, operation: str, write: Write, headers: dict[str, str], fence: Fence | None, timeout: float
    ) -> None:
        try:
            msg = await self._ask(operation, write.subject, write.data, headers, timeout)
        except BusTimeout as error:
            # Without its last message a batch is never stored.
            raise BusUnavailable(operation, f"no answer in the middle of the batch ({error})") from error
        if msg.data and (refused := _decode_ack(msg.data)).error is not None:
            raise _batch_refusal(operation, refused.error, fence)

    async def _send_in_batch(self, operation: str, write: Write, headers: dict[str, str]) -> None:
        client = self._client
        if not client.is_connected:
            raise BusUnavailable(operation, "the connection broke in the middle of the batch")
        try:
            await client.publish(write.subject, write.data, headers=headers)
        except (NatsError, OSError) as error:
            raise BusUnavailable(operation, _plain(error)) from error

    async def read(self, stream: str, subject: str, *, timeout: float = 2.0) -> Record | None:
        """See :meth:`phalanx.ports.Bus.read`."""
        operation = f"read {subject}"
        request = _encode({"last_by_subj": subject})
        msg = await self._ask(operation, f"$JS.API.STREAM.MSG.GET.{stream}", request, None, timeout)
        reply = _decode_get(msg.data)
        if reply.error is not None:
            if reply.error.err_code == NO_MESSAGE_FOUND:
                return None
            raise BusError(operation, reply.error.description, reply.error.err_code)
        if reply.message is None:
            raise BusError(operation, "an answer without a message")
        stored = reply.message
        headers = _parse_headers(base64.b64decode(stored.hdrs)) if stored.hdrs else {}
        data = base64.b64decode(stored.data) if stored.data else b""
        return Record(stored.subject, data, stored.seq, headers, _time(stored.time), is_removed(headers))

    async def snapshot(self, stream: str, subjects: str, *, timeout: float = 2.0) -> list[Record]:
        """See :meth:`phalanx.ports.Bus.snapshot`."""
        operation = f"snapshot {subjects}"
        records, status = await self._gather(
            operation, stream, {"multi_last": [subjects], "batch": 1024}, timeout
        )
        if status.startswith("413"):
            return await self._snapshot_of_many(stream, subjects, timeout)
        return sorted(records, key=lambda record: record.revision)

    async def _snapshot_of_many(self, stream: str, subjects: str, timeout: float) -> list[Record]:
        """More subjects than ``multi_last`` answers (1024): the whole log, of which the last counts."""
        last: dict[str, Record] = {}
        start = 1
        while page := await self.read_log(stream, subjects, start=start, limit=1000, timeout=timeout):
            last.update((record.subject, record) for record in page)
            start = page[-1].revision + 1
        return sorted(last.values(), key=lambda record: record.revision)

    async def read_many(self, stream: str, subjects: Sequence[str], *, timeout: float = 2.0) -> list[Record]:
        """See :meth:`phalanx.ports.Bus.read_many`."""
        request = {"multi_last": list(subjects), "batch": 1024}
        records, status = await self._gather(f"read {len(subjects)} subjects", stream, request, timeout)
        if status.startswith("413"):
            raise BusError(f"read {len(subjects)} subjects", status)
        return sorted(records, key=lambda record: record.revision)

    async def read_log(
        self,
        stream: str,
        subjects: str,
        *,
        start: int = 1,
        start_time: float | None = None,
        limit: int = 256,
        max_bytes: int | None = None,
        timeout: float = 2.0,
    ) -> list[Record]:
        """See :meth:`phalanx.ports.Bus.read_log`."""
        request: dict[str, Any] = {"next_by_subj": subjects, "batch": limit}
        if max_bytes is not None:
            request["max_bytes"] = max_bytes
        if start_time is not None:
            request["start_time"] = datetime.fromtimestamp(start_time, UTC).isoformat()
        else:
            request["seq"] = max(1, start)
        return (await self._gather(f"read log {subjects}", stream, request, timeout))[0]

    async def _gather(
        self, operation: str, stream: str, request: dict[str, Any], timeout: float
    ) -> tuple[list[Record], str]:
        """A direct get with many answers (ADR-31): records up to the end-of-batch, and its status."""
        client = self._client
        if not client.is_connected:
            raise BusUnavailable(operation, "not connected to NATS")
        loop = asyncio.get_running_loop()
        records: list[Record] = []
        end: asyncio.Future[str] = loop.create_future()

        async def keep(msg: Msg) -> None:
            status = _status(msg)
            if status is None:
                records.append(_direct_record(msg))
            elif not end.done():
                end.set_result(status)

        self._gathering.add(end)
        timer = loop.call_later(timeout, _expire, end, operation, timeout)
        inbox = client.new_inbox()
        try:
            answers = await _subscribe(client, inbox, keep)
            try:
                await client.publish(f"$JS.API.DIRECT.GET.{stream}", _encode(request), reply=inbox)
                status = await end
            finally:
                with contextlib.suppress(NatsError):
                    await answers.unsubscribe()
        except (NatsError, OSError) as error:
            raise BusError(operation, _plain(error)) from error
        finally:
            timer.cancel()
            self._gathering.discard(end)
        if status.startswith("503"):
            raise BusUnavailable(operation, "nobody answers there just now")
        if status[:3] not in ("204", "404", "413"):
            raise BusError(operation, status)
        return records, status

    async def publish(
        self, subject: str, data: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`phalanx.ports.Bus.publish`."""
        if not self._client.is_connected:
            raise BusUnavailable(f"publish {subject}", "not connected to NATS")
        try:
            await self._client.publish(subject, data, headers=dict(headers) if headers else None)
        except (NatsError, OSError) as error:
            raise BusError(f"publish {subject}", _plain(error)) from error

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> Message:
        """See :meth:`phalanx.ports.Bus.request`."""
        msg = await self._ask(
            f"request {subject}", subject, data, dict(headers) if headers else None, timeout
        )
        return _message(msg)

    async def gather(
        self,
        subject: str,
        data: bytes = b"",
        *,
        timeout: float = 1.0,
        most: int = 1024,
        is_last: Callable[[Message], bool] | None = None,
    ) -> list[Message]:
        """A core request with many answers: all that came within *timeout* seconds, at most *most*.

        *is_last* is told of each as it comes, and says whether that is all.
        """
        client = self._client
        if not client.is_connected:
            raise BusUnavailable(f"request {subject}", "not connected to NATS")
        answers: list[Message] = []
        enough = asyncio.Event()

        async def keep(msg: Msg) -> None:
            if _status(msg) is not None:
                enough.set()  # no responders
            elif len(answers) < most:
                answers.append(_message(msg))
                if len(answers) == most or (is_last is not None and is_last(answers[-1])):
                    enough.set()

        inbox = client.new_inbox()
        try:
            subscription = await _subscribe(client, inbox, keep)
            try:
                await client.publish(subject, data, reply=inbox)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await enough.wait()
            finally:
                await subscription.unsubscribe()
        except (NatsError, OSError) as error:
            raise BusError(f"request {subject}", _plain(error)) from error
        return answers

    async def subscribe(
        self, subject: str, on_message: Callable[[Message], Awaitable[None] | None], *, queue: str = ""
    ) -> _Subscription:
        """See :meth:`phalanx.ports.Bus.subscribe`."""
        subscription = _Subscription(subject, queue, on_message, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        client = self._client
        if not client.was_connected:
            return subscription  # it is being made, and takes this subscription with the others
        try:
            await subscription.attach(client)
        except NatsError as error:
            if self._closing or not self._client.is_closed:
                self._subscriptions.discard(subscription)
                raise BusError(f"subscribe {subject}", _plain(error)) from error
            # The client is being replaced; the new one takes this subscription with the others.
        return subscription

    async def api(self, subject: str, request: Mapping[str, Any], *, timeout: float = 5.0) -> dict[str, Any]:
        """See :meth:`phalanx.ports.Bus.api`."""
        data = _encode(request) if request else b""
        msg = await self._ask(f"JetStream {subject}", f"$JS.API.{subject}", data, None, timeout)
        answer = _decode_any(msg.data)
        if (error := answer.get("error")) is not None:
            raise BusError(
                f"JetStream {subject}", str(error.get("description", error)), int(error.get("err_code", 0))
            )
        return answer


# --- small things


async def _bounded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Wait for *work* within *seconds*, else TimeoutError. Never longer: nats-py swallows cancellations
    in places, so that neither wait_for() nor timeout() would be a bound."""
    task = asyncio.create_task(work, name="nats bounded")
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_seen)
    if not task.done():
        raise TimeoutError(f"not done within {seconds:g} s")
    return task.result()


def _seen(task: asyncio.Task[Any]) -> None:
    """Whatever becomes of an abandoned task: it is not reported as an error that nobody saw."""
    if not task.cancelled():
        task.exception()


async def _subscribe(
    client: Client, subject: str, on_message: Callable[[Msg], Awaitable[None]], *, queue: str = ""
) -> NatsSubscription:
    untyped: Any = client  # parts of this method's types are unknown in nats-py
    return cast("NatsSubscription", await untyped.subscribe(subject, queue=queue, cb=on_message))


def _expire(future: asyncio.Future[Any], operation: str, timeout: float) -> None:
    if not future.done():
        future.set_exception(BusTimeout(operation, f"no answer within {timeout:g} s; the outcome is unknown"))


def _write_headers(headers: Mapping[str, str] | None, ttl_seconds: float | None) -> dict[str, str]:
    written = dict(headers) if headers else {}
    if ttl_seconds is not None:
        written["Nats-TTL"] = f"{max(1, math.ceil(ttl_seconds))}s"  # ADR-43: whole seconds
    return written


def _batch_headers(write: Write, batch: str, number: int, fence: Fence | None) -> dict[str, str]:
    """Those of message *number*, from 1, of *batch* (ADR-50). The first one carries the fence."""
    headers = _write_headers(write.headers, write.ttl_seconds)
    if fence is not None and number == 1:
        headers.update(_fence_headers(fence))
    return {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}


def _batch_refusal(operation: str, error: _Error, fence: Fence | None) -> BusError:
    if error.err_code in (BATCH_INCOMPLETE, BATCHES_UNDER_WAY):
        return BusUnavailable(operation, error.description, error.err_code)
    return _refusal(operation, error, fence.subject if fence else "", fence.revision if fence else 0)


def _fence_headers(fence: Fence) -> dict[str, str]:
    return {
        "Nats-Expected-Last-Subject-Sequence": str(fence.revision),
        "Nats-Expected-Last-Subject-Sequence-Subject": fence.subject,
    }


def _refusal(operation: str, error: _Error, subject: str, expected: int) -> BusError:
    if error.err_code not in WRONG_LAST_SEQUENCE:
        return BusError(operation, error.description, error.err_code)
    number = error.description.rpartition(":")[2].strip()
    return WrongRevision(subject, expected, int(number) if number.isdigit() else None)


def _message(msg: Msg) -> Message:
    return Message(msg.subject, msg.data, msg.headers or {}, msg.reply)


def _status(msg: Msg) -> str | None:
    """The status line of a message without content (``204 EOB``), None for any other."""
    headers = msg.headers
    if headers is None or "Status" not in headers:
        return None
    return f"{headers['Status']} {headers.get('Description', '')}".strip()


def _direct_record(msg: Msg) -> Record:
    headers = msg.headers or {}
    return Record(
        headers["Nats-Subject"],
        msg.data,
        int(headers["Nats-Sequence"]),
        headers,
        _time(headers.get("Nats-Time-Stamp", "")),
        is_removed(headers),
    )


def _time(text: str) -> float:
    try:
        # Nanoseconds are more than fromisoformat of Python 3.11 takes.
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def _parse_headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode(errors="replace").split("\r\n")[1:]
    return {
        name.strip(): value.strip()
        for name, separator, value in (line.partition(":") for line in lines)
        if separator
    }


def _login(options: NatsOptions) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if options.user:
        given["user"], given["password"] = options.user, options.password.reveal()
    if options.token:
        given["token"] = options.token.reveal()
    if options.nkey_seed:
        given["nkeys_seed_str"] = options.nkey_seed.reveal()
    if options.nkey_seed_file:
        given["nkeys_seed"] = options.nkey_seed_file
    if options.credentials:
        given["user_credentials"] = options.credentials
    return given


def _tls(options: NatsOptions) -> dict[str, Any]:
    wanted = options.tls_ca or options.tls_cert or any(url.startswith("tls:") for url in options.urls)
    if not wanted:
        return {}
    try:
        context = ssl.create_default_context(cafile=options.tls_ca or None)
        if options.tls_cert:
            context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        which = options.tls_ca or options.tls_cert
        raise NatsUnusable(
            f"the TLS files cannot be used ({which}): {error}",
            "check nats.tls_ca, nats.tls_cert, nats.tls_key",
        ) from error
    return {"tls": context, **({"tls_hostname": options.tls_hostname} if options.tls_hostname else {})}


def _without_login(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _plain(error: BaseException | None) -> str:
    if error is None:
        return "no answer"
    text = str(error).strip()
    return text if text else type(error).__name__


def _is_refusal(error: Exception) -> bool:
    """Whether trying again in a moment is pointless: login or certificate are wrong."""
    text = str(error).lower()
    return (
        "authorization" in text or "authentication" in text or isinstance(error, ssl.SSLCertVerificationError)
    )


def _remedy(error: BaseException | None, timeout: float) -> str:
    if isinstance(error, ssl.SSLError):
        return "check nats.tls_ca and the names in the servers' certificates (nats.tls_hostname)"
    if isinstance(error, Exception) and _is_refusal(error):
        return "check the login (nats.user, nats.password, nats.token, nats.nkey_seed, nats.credentials)"
    return f"check nats.urls, and that a nats-server listens there (tried for {timeout:g} s)"
