"""Dead letters: events that a handler could not handle. Kept until somebody publishes them again, or deletes
them.

They lie in one stream of the platform, ``<platform>.<app>.dead.<durable>.<subject>``, with the event's body
and headers, and why and when it was given up in headers of ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from phalanx import system
from phalanx.errors import ConfigError
from phalanx.messaging.content import shape_of
from phalanx.messaging.event import CONTENT_TYPE, KEY, MESSAGE_ID, ONLY_FOR, decoded, key_of
from phalanx.messaging.event_publishing import store_once
from phalanx.names import Names
from phalanx.ports import Bus, Record

REASON = "Phalanx-Dead-Reason"
STREAM = "Phalanx-Dead-Stream"
SEQUENCE = "Phalanx-Dead-Sequence"
ATTEMPTS = "Phalanx-Dead-Attempts"
EVENT_ID = "Phalanx-Dead-Id"

BODY_LEFT = "Phalanx-Dead-Body-Left"
"""The letter would have been too large: the body is in the event alone, as long as that is kept."""

_MAX_REASON = 1000
_HEADER_BYTES = 4
"""What a header takes besides its name and value: ": " and the end of the line."""
_ROOM_BYTES = 256
"""For the first line of the headers, and those that the bus adds."""
_PAGE = 256


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was given up. ``number``: by which it is shown, published again, deleted.

    ``sequence``: that of the event in ``stream``; ``time``: when it was given up, Unix seconds.
    """

    number: int
    app: str
    durable: str
    subject: str
    key: str
    reason: str
    attempts: int
    stream: str
    sequence: int
    time: float
    data: bytes
    headers: dict[str, str]

    def content(self) -> Any:
        """What the event says, of no declared type. Raises ContentError where it is of no known format."""
        return decoded(self.data, self.headers, shape_of(Any))


async def bury(
    bus: Bus,
    names: Names,
    *,
    app: str,
    durable: str,
    stream: str,
    subject: str,
    sequence: int,
    data: bytes,
    headers: dict[str, str],
    attempts: int,
    reason: str,
    timeout: float,
) -> None:
    """Store an event as a dead letter, once however often it is tried. Raises BusError."""
    ours = {
        # Of the app, too: two may handle the platform's events under one name.
        MESSAGE_ID: f"{stream}-{app}-{durable}-{sequence}",
        EVENT_ID: headers.get(MESSAGE_ID, ""),
        STREAM: stream,
        SEQUENCE: str(sequence),
        ATTEMPTS: str(attempts),
        REASON: _one_line(reason),
    }
    kept = {name: value for name, value in headers.items() if not name.startswith("Nats-")}
    data, kept = _fitting(data, kept, ours, bus.max_payload - _ROOM_BYTES)
    await store_once(bus, names.dead_subject(app, durable, subject), data, kept, timeout)


def _fitting(
    data: bytes, kept: dict[str, str], ours: dict[str, str], most_bytes: int
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a letter. Who is no part of Phalanx may publish an event that leaves no room for
    *ours*, and its key waits until there is a letter: then other headers are left out, or the body."""
    if len(data) + _size(kept | ours) > most_bytes:
        kept = {name: kept[name] for name in (KEY, CONTENT_TYPE, ONLY_FOR) if name in kept}
    if len(data) + _size(kept | ours) > most_bytes:
        return b"", {**kept, **ours, BODY_LEFT: "1"}
    return data, {**kept, **ours}


def _size(headers: dict[str, str]) -> int:
    return sum(len(name) + len(value.encode()) + _HEADER_BYTES for name, value in headers.items())


def _one_line(text: str) -> str:
    plain = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(plain.encode("ascii", "replace").decode().split())[:_MAX_REASON]


class DeadLetters:
    """The dead letters of a platform, over one connection."""

    def __init__(self, bus: Bus, names: Names) -> None:
        self._bus, self._names = bus, names

    async def list(self, app: str | None = None, durable: str | None = None) -> AsyncIterator[DeadLetter]:
        """All of them, oldest first; of one *app*, of one of its durable consumers. Raises BusError."""
        subjects = self._names.dead_subject(app or "*", durable or "*")
        start = 1
        while page := await self._bus.read_log(self._names.dead_stream, subjects, start=start, limit=_PAGE):
            for record in page:
                yield _letter(record)
            start = page[-1].revision + 1

    async def get(self, number: int) -> DeadLetter:
        """One of them. Raises ConfigError if there is none of that number, BusError.

        A body that did not fit into it is read from the event; empty if that is not kept any more.
        """
        page = await self._bus.read_log(
            self._names.dead_stream, self._names.dead_subjects, start=number, limit=1
        )
        if not page or page[0].revision != number:
            raise ConfigError("number", number, "no dead letter", "see: phalanx events dead list")
        letter = _letter(page[0])
        if BODY_LEFT not in letter.headers:
            return letter
        subject = self._names.event_subject(_app_of(letter, self._names), letter.subject)
        events = await self._bus.read_log(letter.stream, subject, start=letter.sequence, limit=1)
        if not events or events[0].revision != letter.sequence:
            return letter
        headers = {name: value for name, value in letter.headers.items() if name != BODY_LEFT}
        return msgspec.structs.replace(letter, data=events[0].data, headers=headers)

    async def delete(self, number: int) -> DeadLetter:
        """Remove one for good. Raises ConfigError, BusError."""
        letter = await self.get(number)
        await self._bus.api(f"STREAM.MSG.DELETE.{self._names.dead_stream}", {"seq": number})
        return letter

    async def retry(self, number: int) -> int:
        """Publish its event again, for the handler alone that gave it up, and delete it; the new sequence.

        Raises ConfigError, BusError.
        """
        letter = await self.get(number)
        if BODY_LEFT in letter.headers:
            problem = "its body did not fit into the letter, and the event is not kept any more"
            raise ConfigError("number", number, problem, "delete it, and have the event published again")
        headers = {name: value for name, value in letter.headers.items() if not name.startswith("Nats-")}
        for name in (REASON, STREAM, SEQUENCE, ATTEMPTS, EVENT_ID):
            headers.pop(name, None)
        # Twice at the same time, or after a failure before the delete: stored once.
        headers[MESSAGE_ID] = f"retry-{self._names.dead_stream}-{number}"
        headers[ONLY_FOR] = f"{letter.app}/{letter.durable}"
        subject = self._names.event_subject(_app_of(letter, self._names), letter.subject)
        sequence = await store_once(self._bus, subject, letter.data, headers, 10.0)
        await self._bus.api(f"STREAM.MSG.DELETE.{self._names.dead_stream}", {"seq": number})
        return sequence


def _app_of(letter: DeadLetter, names: Names) -> str | None:
    """Whose event it was; None: the platform's."""
    return None if letter.stream == names.events_stream(None) else letter.app


def _letter(record: Record) -> DeadLetter:
    headers = dict(record.headers)
    app, _, durable, subject = record.subject.split(".", 4)[1:]
    return DeadLetter(
        number=record.revision,
        app=app,
        durable=durable,
        subject=subject,
        key=key_of(headers),
        reason=headers.get(REASON, ""),
        attempts=_number(headers.get(ATTEMPTS, "")),
        stream=headers.get(STREAM, ""),
        sequence=_number(headers.get(SEQUENCE, "")),
        time=record.time or system.wall(),
        data=record.data,
        headers=headers,
    )


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


__all__ = ["DeadLetter", "DeadLetters", "bury"]
