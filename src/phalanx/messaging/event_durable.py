"""A durable consumer in JetStream: made once, found again, brought in line with its declaration."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from phalanx.errors import BusError, EventError
from phalanx.messaging.event_handlers import EventHandler
from phalanx.names import Names
from phalanx.ports import STREAM_NOT_FOUND, Bus

log = logging.getLogger("phalanx.events")

CONSUMER_NOT_FOUND = 10014
"""JSConsumerNotFoundErr."""

_SECOND = 1_000_000_000
_ANSWER_SECONDS = 5.0


class Durable:
    """The consumer of one handler. ``name`` in ``stream``."""

    def __init__(self, handler: EventHandler, bus: Bus, names: Names) -> None:
        self._handler, self._bus = handler, bus
        self._app = None if handler.of_platform else handler.app
        self.stream = names.events_stream(self._app)
        self.name = names.durable_name(handler.app, handler.durable, of_platform=handler.of_platform)
        self._filter = names.event_subject(self._app, handler.pattern)

    async def declare(self) -> None:
        """See that it exists, as it is declared. Raises BusError, EventError where there is no stream."""
        present = await self._present()
        wanted = self._config()
        if present is not None:
            changed = {key: value for key, value in wanted.items() if present.get(key) != value}
            if not changed:
                return
            log.warning("durable consumer %s of %s: now %s", self.name, self.stream, changed)
            wanted = {**present, **changed}
        else:
            wanted |= self._start()
        request = {"stream_name": self.stream, "config": wanted}
        await self._bus.api(f"CONSUMER.CREATE.{self.stream}.{self.name}", request, timeout=_ANSWER_SECONDS)

    async def _present(self) -> dict[str, Any] | None:
        try:
            info = await self._bus.api(
                f"CONSUMER.INFO.{self.stream}.{self.name}", {}, timeout=_ANSWER_SECONDS
            )
        except BusError as error:
            if error.code == STREAM_NOT_FOUND:
                raise EventError(
                    f"there is no stream {self.stream} for durable consumer {self._handler.durable}",
                    "see docs/operations.md",
                ) from None
            if error.code == CONSUMER_NOT_FOUND:
                return None
            raise
        return info["config"]

    def _config(self) -> dict[str, Any]:
        handler = self._handler
        return {
            "durable_name": self.name,
            "name": self.name,
            "ack_policy": "explicit",
            "filter_subjects": [self._filter],
            "ack_wait": round(handler.ack_wait_seconds * _SECOND),
            "max_ack_pending": handler.in_flight,
            "max_deliver": -1,  # we count, and keep a dead letter
        }

    def _start(self) -> dict[str, Any]:
        """Where a consumer that is new begins."""
        start = self._handler.start
        if isinstance(start, str):
            return {"deliver_policy": start}
        moment = start if isinstance(start, datetime) else datetime.fromtimestamp(start, UTC)
        return {"deliver_policy": "by_start_time", "opt_start_time": moment.astimezone(UTC).isoformat()}

    async def first_sequence(self) -> int:
        """The first one that the stream still holds. Raises BusError."""
        info = await self._bus.api(f"STREAM.INFO.{self.stream}", {}, timeout=_ANSWER_SECONDS)
        return int(info["state"]["first_seq"])


__all__ = ["CONSUMER_NOT_FOUND", "Durable"]
