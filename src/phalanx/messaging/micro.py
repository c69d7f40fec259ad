"""The NATS micro protocol (ADR-32): an app that answers calls is a service that ``nats micro`` shows."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from phalanx import system
from phalanx.messaging.handlers import Handler, Handlers
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription
from phalanx.version import VERSION

_SEMVER = re.compile(r"\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?")
_encode = msgspec.json.Encoder(enc_hook=str).encode


class MicroService:
    """What one app's instance on one node says of itself. Its endpoints are the app's methods."""

    def __init__(self, app: str, node: str, handlers: Handlers, bus: Bus, names: Names) -> None:
        self._app, self._node, self._handlers = app, node, handlers
        self._bus, self._names = bus, names
        self.id = secrets.token_hex(11)
        self.is_ring = False
        """Whether the owner of a partition answers them."""
        self.is_pool = False
        """Whether any instance answers all of its methods."""
        self._started = datetime.fromtimestamp(system.wall(), UTC).isoformat().replace("+00:00", "Z")
        self._subscriptions: list[Subscription] = []

    async def open(self) -> None:
        """Begin to answer PING, INFO and STATS. Raises BusError."""
        answers = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        for verb, answer in answers.items():
            for path in ((), (self._app,), (self._app, self.id)):
                subject = self._names.service_subject(verb, *path)
                self._subscriptions.append(await self._bus.subscribe(subject, self._answering(answer)))

    async def close(self) -> None:
        """Answer no more."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()

    def _answering(self, answer: Callable[[], dict[str, Any]]) -> Callable[[Message], Any]:
        async def on_message(message: Message) -> None:
            if self._names.takes_answers(message.reply):
                await self._bus.publish(message.reply, _encode(answer()))

        return on_message

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self._app,
            "id": self.id,
            "version": VERSION if _SEMVER.fullmatch(VERSION) else "0.0.0",
            "metadata": {"platform": self._names.platform, "node": self._node},
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def _info(self) -> dict[str, Any]:
        endpoints = [
            {
                **self._endpoint(handler),
                "metadata": {
                    "idempotent": str(handler.idempotent).lower(),
                    "anywhere": str(handler.anywhere).lower(),
                },
            }
            for handler in self._handlers.by_name.values()
        ]
        description = f"app {self._app} of platform {self._names.platform}"
        return {**self._identity("info"), "description": description, "endpoints": endpoints}

    def _stats(self) -> dict[str, Any]:
        endpoints = [
            {
                **self._endpoint(handler),
                "num_requests": handler.requests,
                "num_errors": handler.errors,
                "last_error": handler.last_error,
                "processing_time": handler.processing_ns,
                "average_processing_time": handler.processing_ns // max(1, handler.requests),
            }
            for handler in self._handlers.by_name.values()
        ]
        return {**self._identity("stats"), "started": self._started, "endpoints": endpoints}

    def _endpoint(self, handler: Handler) -> dict[str, Any]:
        names = self._names
        if handler.anywhere or self.is_pool:
            subject, queue = names.call_any_subject(self._app, handler.name), names.call_queue(self._app)
        elif self.is_ring:
            subject, queue = names.call_partition_subject(self._app, "*", handler.name), ""
        else:
            subject, queue = names.call_leader_subject(self._app, handler.name), ""
        if handler.is_stream:
            subject = names.many_subject(subject)
        return {"name": handler.name, "subject": subject, "queue_group": queue}
