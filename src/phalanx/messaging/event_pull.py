"""Pulls the events of one durable consumer: requests, deliveries, acknowledgements (NATS ADR-13, ADR-15)."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.ports import Bus, Connection, Message, Subscription

log = logging.getLogger("phalanx.events")

EXPIRES_SECONDS = 10.0
"""How long a request stands. What a node that died had asked for is dropped with its connection."""

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 3.0
"""After so long without heartbeats nobody serves our requests any more: they are made again."""

RETRY_SECONDS = 0.1

ACK, IN_PROGRESS, TERM = b"+ACK", b"+WPI", b"+TERM"

_SECOND = 1_000_000_000
_encode = msgspec.json.Encoder().encode


def nak(delay_seconds: float = 0.0) -> bytes:
    """The acknowledgement that asks for the event again, after that long."""
    return b'-NAK {"delay": %d}' % round(delay_seconds * _SECOND) if delay_seconds > 0 else b"-NAK"


class Delivery:
    """One delivery, by its acknowledgement subject: ``$JS.ACK.<stream>.<consumer>.<attempt>.<sequence>.
    <number>.<time>.<pending>``, or with domain and account before the stream.

    ``number`` counts the deliveries of the consumer, to whomever; ``pending``: events that it has not
    delivered yet.
    """

    __slots__ = ("attempt", "message", "number", "pending", "sequence", "time")

    def __init__(self, message: Message) -> None:
        tokens = message.reply.split(".")
        first = 4 if len(tokens) == 9 else 6
        self.message = message
        self.attempt, self.sequence, self.number = (
            int(tokens[first]),
            int(tokens[first + 1]),
            int(tokens[first + 2]),
        )
        self.time, self.pending = int(tokens[first + 3]) / _SECOND, int(tokens[first + 4])


class ConsumerInfo(msgspec.Struct, frozen=True):
    """What the server says of a consumer. ``delivered`` and ``number``: the last event's sequence and how
    many deliveries there were; ``floor``: up to there all are acknowledged; ``unacknowledged``, ``pending``:
    how many are delivered, and how many are not yet."""

    delivered: int
    number: int
    floor: int
    unacknowledged: int
    redelivered: int
    pending: int
    config: dict[str, Any]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> ConsumerInfo:
        """From the answer of JetStream's API."""
        return cls(
            answer["delivered"]["stream_seq"],
            answer["delivered"]["consumer_seq"],
            answer["ack_floor"]["stream_seq"],
            answer["num_ack_pending"],
            answer["num_redelivered"],
            answer["num_pending"],
            answer["config"],
        )


class Puller:
    """Keeps as many events asked for as *room* says. *on_delivery* gets each. One task: :meth:`run`."""

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        stream: str,
        consumer: str,
        room: Callable[[], int],
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        self._bus, self._stream, self._consumer = bus, stream, consumer
        self._room, self._on_delivery = room, on_delivery
        inbox = names.event_inbox(app, secrets.token_hex(8))
        self._inbox, self._inbox_prefix = inbox, inbox.removesuffix("*")
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._asked_for = 0
        self._requests = 0
        self._heard_at = 0.0
        self._wanted = asyncio.Event()
        self._subscription: Subscription | None = None
        self._stop_listening: Callable[[], None] | None = None

    async def open(self) -> None:
        """Begin to listen. Raises BusError."""
        self._stop_listening = self._bus.on_connection(self._on_connection)
        self._subscription = await self._bus.subscribe(self._inbox, self._on_message, direct=True)

    async def close(self) -> None:
        """Listen no more."""
        if self._stop_listening is not None:
            self._stop_listening()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def look(self) -> None:
        """There may be more room."""
        self._wanted.set()

    async def run(self) -> None:
        """Ask for events, until cancelled."""
        while True:
            self._wanted.clear()
            if self._asked_for and system.now() - self._heard_at > SILENCE_SECONDS:
                log.debug("consumer %s: nothing was heard, asking again", self._consumer)
                self._asked_for = 0
            room = self._room() - self._asked_for
            seconds = HEARTBEAT_SECONDS
            if room > 0 and (self._asked_for == 0 or room >= self._asked_for) and not self._ask(room):
                seconds = RETRY_SECONDS
            await wait_at_most(self._wanted, seconds)

    def _ask(self, batch: int) -> bool:
        request = _encode(
            {
                "batch": batch,
                "expires": round(EXPIRES_SECONDS * _SECOND),
                "idle_heartbeat": round(HEARTBEAT_SECONDS * _SECOND),
            }
        )
        self._requests += 1
        try:
            self._bus.send(self._next, request, reply=f"{self._inbox_prefix}{self._requests}")
        except BusError as error:
            log.debug("consumer %s: %s", self._consumer, error)
            return False
        self._asked_for += batch
        self._heard_at = system.now()
        return True

    def _on_connection(self, event: Connection) -> None:
        if event in (Connection.CONNECTED, Connection.MISSED):
            self._asked_for = 0
            self._wanted.set()

    def _on_message(self, message: Message) -> None:
        self._heard_at = system.now()
        if message.reply.startswith("$JS.ACK."):
            self._asked_for -= 1 if self._asked_for else 0
            self._on_delivery(Delivery(message))
            return
        status = message.headers.get("Status", "")
        if status in ("", "100"):
            return
        # 408: it has expired; 409: the consumer has another leader, or is gone.
        pending = message.headers.get("Nats-Pending-Messages", "")
        self._asked_for -= min(self._asked_for, int(pending) if pending.isdigit() else self._asked_for)
        if status not in ("408", "404"):
            log.debug("consumer %s: %s %s", self._consumer, status, message.headers.get("Description", ""))
        self._wanted.set()

    # --- acknowledgements

    def say(self, ack_subject: str, what: bytes) -> bool:
        """Acknowledge a delivery; whether it could be sent."""
        try:
            self._bus.send(ack_subject, what)
        except BusError as error:
            log.debug("consumer %s: acknowledging: %s", self._consumer, error)
            return False
        return True

    def subject_for(self, sequence: int, info: ConsumerInfo) -> str:
        """The acknowledgement subject of a delivery that went to somebody else. The server looks at sequence
        and number alone, of which the number only has to be one that it has given."""
        return f"$JS.ACK.{self._stream}.{self._consumer}.1.{sequence}.{info.number}.0.0"

    async def info(self) -> ConsumerInfo:
        """What the server knows of the consumer. Raises BusError."""
        subject = f"CONSUMER.INFO.{self._stream}.{self._consumer}"
        return ConsumerInfo.of(await self._bus.api(subject, {}, timeout=2.0))


__all__ = ["ACK", "IN_PROGRESS", "TERM", "ConsumerInfo", "Delivery", "Puller", "nak"]
