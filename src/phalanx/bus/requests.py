"""Requests and their answers over one connection, each with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, OutboundBufferLimitError
from nats.errors import Error as NatsError

from phalanx.aio import Deadlines
from phalanx.bus.client import NatsClient, subscribe
from phalanx.bus.jetstream import direct_record, encode, status_of
from phalanx.bus.login import plain
from phalanx.errors import BusError, BusTimeout, BusUnavailable
from phalanx.ports import Message, Record


class Requests:
    """Those that are under way. A request on a connection that broke is not answered any more, but only its
    timeout would tell: :meth:`fail` says so at once (outcome unknown)."""

    def __init__(self) -> None:
        self._client: NatsClient | None = None
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._gathering: set[asyncio.Future[str]] = set()
        self._deadlines: Deadlines[asyncio.Future[Message]] = Deadlines(_no_answer)
        self._tokens = itertools.count(1)
        self._inbox = ""

    async def attach(self, client: NatsClient) -> None:
        """Send them over *client* from now on. Raises nats-py's errors."""
        inbox = client.new_inbox()
        await client.subscribe_directly(f"{inbox}.*", "", self._on_reply)
        self._client, self._inbox = client, inbox

    def _connected(self, operation: str) -> NatsClient:
        if self._client is None or not self._client.is_connected:
            raise BusUnavailable(operation, "not connected to NATS")
        return self._client

    def _on_reply(self, message: Message) -> None:
        future = self._waiting.pop(message.subject.rpartition(".")[2], None)
        if future is not None and not future.done():
            future.set_result(message)

    async def ask(
        self, operation: str, subject: str, data: bytes, headers: Mapping[str, str] | None, timeout: float
    ) -> Message:
        """One request, one reply. Raises BusUnavailable, BusTimeout, BusError."""
        client = self._client
        if client is None:
            raise BusUnavailable(operation, "not connected to NATS")
        token = str(next(self._tokens))
        future: asyncio.Future[Message] = client.loop.create_future()
        self._waiting[token] = future
        slot = self._deadlines.add(future, timeout)
        try:
            client.send(subject, data, f"{self._inbox}.{token}", headers)
            message = await future
        except _NotInTime:
            raise BusTimeout(operation, f"no answer within {timeout:g} s; the outcome is unknown") from None
        except (OutboundBufferLimitError, ConnectionClosedError):
            raise BusUnavailable(operation, "not connected to NATS") from None
        except NatsError as error:
            raise BusError(operation, plain(error)) from error
        finally:
            self._deadlines.remove(future, slot)
            self._waiting.pop(token, None)
        if not message.data and message.headers.get("Status") == "503":
            raise BusUnavailable(operation, "nobody answers there just now")
        return message

    async def gather_records(
        self, operation: str, stream: str, request: dict[str, Any], timeout: float
    ) -> tuple[list[Record], str]:
        """A direct get with many answers (ADR-31): records up to the end-of-batch, and its status."""
        client = self._connected(operation)
        loop = asyncio.get_running_loop()
        records: list[Record] = []
        end: asyncio.Future[str] = loop.create_future()

        async def keep(msg: Msg) -> None:
            status = status_of(msg)
            if status is None:
                records.append(direct_record(msg))
            elif not end.done():
                end.set_result(status)

        self._gathering.add(end)
        timer = loop.call_later(timeout, _expire, end, operation, timeout)
        inbox = client.new_inbox()
        try:
            answers = await subscribe(client, inbox, keep)
            try:
                await client.publish(f"$JS.API.DIRECT.GET.{stream}", encode(request), reply=inbox)
                status = await end
            finally:
                with contextlib.suppress(NatsError):
                    await answers.unsubscribe()
        except (NatsError, OSError) as error:
            raise BusError(operation, plain(error)) from error
        finally:
            timer.cancel()
            self._gathering.discard(end)
        if status.startswith("503"):
            raise BusUnavailable(operation, "nobody answers there just now")
        if status[:3] not in ("204", "404", "413"):
            raise BusError(operation, status)
        return records, status

    def fail(self, why: str) -> None:
        """The connection of all that are under way is gone: they are not answered any more."""
        waiting, self._waiting = self._waiting, {}
        open_requests: list[asyncio.Future[Any]] = [*waiting.values(), *self._gathering]
        for future in open_requests:
            if not future.done():
                future.set_exception(BusTimeout("request", f"{why}; whether it was carried out is unknown"))


class _NotInTime(Exception):
    """The deadline of a request is over."""


def _no_answer(future: asyncio.Future[Message]) -> None:
    if not future.done():
        future.set_exception(_NotInTime())


def _expire(future: asyncio.Future[Any], operation: str, timeout: float) -> None:
    if not future.done():
        future.set_exception(BusTimeout(operation, f"no answer within {timeout:g} s; the outcome is unknown"))


__all__ = ["Requests"]
