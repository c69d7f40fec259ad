"""The bus over nats-py: everything that :class:`phalanx.ports.Bus` promises, in terms of JetStream's API."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import CoroutineType
from typing import Any

from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, OutboundBufferLimitError
from nats.errors import Error as NatsError

from phalanx.aio import wait_at_most
from phalanx.bus.client import subscribe
from phalanx.bus.jetstream import (
    NO_MESSAGE_FOUND,
    batch_headers,
    batch_refusal,
    decode_ack,
    decode_any,
    decode_get,
    encode,
    fence_headers,
    message_of,
    parse_headers,
    refusal,
    status_of,
    time_of,
    write_headers,
)
from phalanx.bus.link import NatsLink
from phalanx.bus.login import plain
from phalanx.bus.requests import Requests
from phalanx.bus.subscription import BusSubscription
from phalanx.config.node import NatsOptions
from phalanx.errors import BusError, BusTimeout, BusUnavailable
from phalanx.names import FENCE_KEY, LEADER_KEY, MEMBERS_KEY
from phalanx.ports import Connection, Fence, Message, Record, Write, is_removed

UNANSWERED_BYTES = 1 << 20
"""How much of a batch is sent before the server has to answer once: what is on its way stays bounded."""


class NatsBus:
    """One connection to NATS. Make it with :meth:`connect`, end it with :meth:`close`."""

    def __init__(self, options: NatsOptions, name: str, ping_interval: float) -> None:
        self._requests = Requests()
        self._link = NatsLink(options, name, ping_interval, self._requests)

    @classmethod
    async def connect(
        cls, options: NatsOptions, *, name: str = "phalanx", ping_interval: float = 1.0, timeout: float = 10.0
    ) -> NatsBus:
        """Connect, within *timeout* seconds. Raises NatsUnusable, with what the servers answered.

        A server that does not answer pings for three *ping_interval* seconds is given up for another.
        """
        bus = cls(options, name, ping_interval)
        await bus._link.open(timeout)
        return bus

    async def close(self) -> None:
        """End the connection; requests under way fail. Bounded, also when the servers hang."""
        await self._link.close()

    # --- the connection

    def missed(self) -> None:
        """See :meth:`phalanx.ports.Bus.missed`."""
        self._link.missed()

    async def switch_server(self, why: str) -> None:
        """See :meth:`phalanx.ports.Bus.switch_server`."""
        await self._link.switch_server(why)

    def on_connection(self, callback: Callable[[Connection], None]) -> Callable[[], None]:
        """Be told of connection changes; returns a function that ends this."""
        return self._link.on_connection(callback)

    @property
    def is_connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._link.client.is_connected

    @property
    def server_name(self) -> str:
        """The server this client is connected to at present, empty when it is not."""
        return self._link.server_name

    @property
    def server_version(self) -> str:
        """The version of the connected (or last connected) server."""
        return str(self._link.info.get("version", ""))

    @property
    def cluster(self) -> str:
        """The cluster name of the connected server; empty where there is no cluster."""
        return str(self._link.info.get("cluster", ""))

    @property
    def connect_urls(self) -> tuple[str, ...]:
        """Where the servers of the cluster listen, as the connected one knows them."""
        return tuple(str(url) for url in self._link.info.get("connect_urls") or ())

    @property
    def last_error(self) -> str:
        """What the server complained of last, such as a missing permission; empty if of nothing."""
        return self._link.last_error

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        return self._link.client.max_payload

    # --- writing

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
        all_headers = write_headers(headers, ttl_seconds)
        if expect is not None:
            all_headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
            if fence is not None:
                return await self._write_batch(subject, data, expect, fence, all_headers, timeout)
        elif fence is not None:
            all_headers.update(fence_headers(fence))
        operation = f"write {subject}"
        msg = await self._requests.ask(operation, subject, data, all_headers or None, timeout)
        ack = decode_ack(msg.data)
        if ack.error is not None:
            if expect is not None:
                raise refusal(operation, ack.error, subject, expect)
            raise refusal(
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
        beside = f"{fence.subject.removesuffix(LEADER_KEY).removesuffix(MEMBERS_KEY)}{FENCE_KEY}"
        first = {**fence_headers(fence), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": "1"}
        last = {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": "2", "Nats-Batch-Commit": "1"}
        operation = f"write {subject}"
        begun = await self._requests.ask(operation, beside, b"", first, timeout)
        if begun.data and (refused := decode_ack(begun.data)).error is not None:
            raise refusal(operation, refused.error, fence.subject, fence.revision)
        ack = decode_ack((await self._requests.ask(operation, subject, data, last, timeout)).data)
        if ack.error is not None:
            # The server does not say which of the two expectations failed: the caller looks.
            raise refusal(operation, ack.error, "", expect)
        return ack.seq

    async def write_many(
        self, writes: Sequence[Write], *, fence: Fence | None = None, timeout: float = 2.0
    ) -> int:
        """See :meth:`phalanx.ports.Bus.write_many`."""
        batch, operation = secrets.token_hex(12), f"write {len(writes)} messages at once"
        unanswered = 0
        for number, write in enumerate(writes[:-1], 1):
            headers = batch_headers(write, batch, number, fence)
            unanswered += len(write.data)
            # The first is answered in any case: it opens the batch, and is refused where that can't be.
            if number == 1 or unanswered >= UNANSWERED_BYTES:
                await self._ask_in_batch(operation, write, headers, fence, timeout)
                unanswered = 0
            else:
                await self._send_in_batch(operation, write, headers)
        last = writes[-1]
        headers = {**batch_headers(last, batch, len(writes), fence), "Nats-Batch-Commit": "1"}
        ack = decode_ack(
            (await self._requests.ask(operation, last.subject, last.data, headers, timeout)).data
        )
        if ack.error is not None:
            raise batch_refusal(operation, ack.error, fence)
        return ack.seq

    async def _ask_in_batch(
        self, operation: str, write: Write, headers: dict[str, str], fence: Fence | None, timeout: float
    ) -> None:
        try:
            msg = await self._requests.ask(operation, write.subject, write.data, headers, timeout)
        except BusTimeout as error:
            # Without its last message a batch is never stored.
            raise BusUnavailable(operation, f"no answer in the middle of the batch ({error})") from error
        if msg.data and (refused := decode_ack(msg.data)).error is not None:
            raise batch_refusal(operation, refused.error, fence)

    async def _send_in_batch(self, operation: str, write: Write, headers: dict[str, str]) -> None:
        client = self._link.client
        if not client.is_connected:
            raise BusUnavailable(operation, "the connection broke in the middle of the batch")
        try:
            await client.publish(write.subject, write.data, headers=headers)
        except (NatsError, OSError) as error:
            raise BusUnavailable(operation, plain(error)) from error

    # --- reading

    async def read(self, stream: str, subject: str, *, timeout: float = 2.0) -> Record | None:
        """See :meth:`phalanx.ports.Bus.read`."""
        operation = f"read {subject}"
        request = encode({"last_by_subj": subject})
        msg = await self._requests.ask(operation, f"$JS.API.STREAM.MSG.GET.{stream}", request, None, timeout)
        reply = decode_get(msg.data)
        if reply.error is not None:
            if reply.error.err_code == NO_MESSAGE_FOUND:
                return None
            raise BusError(operation, reply.error.description, reply.error.err_code)
        if reply.message is None:
            raise BusError(operation, "an answer without a message")
        stored = reply.message
        headers = parse_headers(base64.b64decode(stored.hdrs)) if stored.hdrs else {}
        data = base64.b64decode(stored.data) if stored.data else b""
        return Record(stored.subject, data, stored.seq, headers, time_of(stored.time), is_removed(headers))

    async def snapshot(self, stream: str, subjects: str, *, timeout: float = 2.0) -> list[Record]:
        """See :meth:`phalanx.ports.Bus.snapshot`."""
        operation = f"snapshot {subjects}"
        records, status = await self._requests.gather_records(
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
        records, status = await self._requests.gather_records(
            f"read {len(subjects)} subjects", stream, request, timeout
        )
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
        return (await self._requests.gather_records(f"read log {subjects}", stream, request, timeout))[0]

    # --- messages

    async def publish(
        self, subject: str, data: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`phalanx.ports.Bus.publish`."""
        self.send(subject, data, headers)

    def new_inbox(self) -> str:
        """See :meth:`phalanx.ports.Bus.new_inbox`."""
        return self._link.client.new_inbox()

    def send(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """See :meth:`phalanx.ports.Bus.send`."""
        try:
            self._link.client.send(subject, data, reply, headers)
        except (ConnectionClosedError, OutboundBufferLimitError):
            raise BusUnavailable(f"publish {subject}", "not connected to NATS") from None
        except NatsError as error:
            raise BusError(f"publish {subject}", plain(error)) from error

    def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> CoroutineType[Any, Any, Message]:
        """See :meth:`phalanx.ports.Bus.request`."""
        return self._requests.ask(f"request {subject}", subject, data, headers, timeout)

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
        client = self._link.client
        if not client.is_connected:
            raise BusUnavailable(f"request {subject}", "not connected to NATS")
        answers: list[Message] = []
        enough = asyncio.Event()

        async def keep(msg: Msg) -> None:
            if status_of(msg) is not None:
                enough.set()  # no responders
            elif len(answers) < most:
                answers.append(message_of(msg))
                if len(answers) == most or (is_last is not None and is_last(answers[-1])):
                    enough.set()

        inbox = client.new_inbox()
        try:
            subscription = await subscribe(client, inbox, keep)
            try:
                await client.publish(subject, data, reply=inbox)
                await wait_at_most(enough, timeout)
            finally:
                await subscription.unsubscribe()
        except (NatsError, OSError) as error:
            raise BusError(f"request {subject}", plain(error)) from error
        return answers

    async def subscribe(
        self,
        subject: str,
        on_message: Callable[[Message], Awaitable[None] | None],
        *,
        queue: str = "",
        direct: bool = False,
    ) -> BusSubscription:
        """See :meth:`phalanx.ports.Bus.subscribe`."""
        return await self._link.subscribe(subject, on_message, queue, direct=direct)

    async def api(self, subject: str, request: Mapping[str, Any], *, timeout: float = 5.0) -> dict[str, Any]:
        """See :meth:`phalanx.ports.Bus.api`."""
        data = encode(request) if request else b""
        msg = await self._requests.ask(f"JetStream {subject}", f"$JS.API.{subject}", data, None, timeout)
        answer = decode_any(msg.data)
        if (error := answer.get("error")) is not None:
            raise BusError(
                f"JetStream {subject}", str(error.get("description", error)), int(error.get("err_code", 0))
            )
        return answer


__all__ = ["NatsBus"]
