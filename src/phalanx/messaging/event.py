"""What an event is: its subject, its headers on the wire, and how it looks to who handles it.

An event is a JetStream message: the body as JSON or MessagePack (``Content-Type``), the id under which it is
stored once in ``Nats-Msg-Id``, the key whose events stay in order in ``Phalanx-Key``. Whatever else is in its
headers is the publisher's own. See docs/events.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import quote, unquote

from phalanx.errors import ConfigError, EventError
from phalanx.messaging.content import CONTENT_TYPES, JSON, ContentError, Shape, encode

T = TypeVar("T")

CONTENT_TYPE = "Content-Type"
MESSAGE_ID = "Nats-Msg-Id"
KEY = "Phalanx-Key"
"""Percent-encoded where it is not plain ASCII, as headers hold no other text."""
ONLY_FOR = "Phalanx-Only-For"
"""``app/durable`` of a dead letter that was published again: it is for that handler alone."""

MAX_SUBJECT = 255
MAX_KEY = 256
HEADER_ROOM_BYTES = 8192
"""What of the largest message is kept for headers, also those that a dead letter gets besides."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_NAME = re.compile(r"[A-Za-z0-9-]{1,63}")
_PLAIN = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}~"
_HEADER = re.compile(r"[A-Za-z0-9-]{1,100}")


class Event(Generic[T]):
    """One event, as a handler or a subscription gets it.

    ``subject``: as it was published, such as ``user.created``. ``data``: of the declared type. ``sequence``:
    its place in the stream; it only grows. ``time``: when it was stored, Unix seconds by the server's clock.
    ``key``: empty if it was published without. ``attempt``: how often it was delivered to this durable
    consumer, from 1; also deliveries whose handler was interrupted count. ``id``: what it was stored once
    under. ``headers``: the publisher's, and ours.
    """

    __slots__ = ("attempt", "data", "headers", "id", "key", "sequence", "subject", "time")

    def __init__(
        self,
        subject: str,
        data: T,
        *,
        sequence: int,
        time: float,
        key: str = "",
        attempt: int = 1,
        headers: Mapping[str, str],
    ) -> None:
        self.subject, self.data, self.sequence, self.time = subject, data, sequence, time
        self.key, self.attempt, self.headers = key, attempt, headers
        self.id = headers.get(MESSAGE_ID, "")

    def __repr__(self) -> str:
        return f"<Event {self.subject} sequence={self.sequence} key={self.key!r} attempt={self.attempt}>"


def check_subject(subject: object, *, pattern: bool = False) -> str:
    """*subject* of an event; *pattern*: ``*`` and a last ``>`` may stand for tokens. Raises ConfigError."""
    remedy = "write tokens of A-Z, a-z, 0-9, _ and - with dots between, such as user.created"
    if not isinstance(subject, str) or not subject:
        raise ConfigError("subject", subject, "no subject of an event", remedy)
    if len(subject) > MAX_SUBJECT:
        raise ConfigError("subject", subject, f"longer than {MAX_SUBJECT} characters", "write a shorter one")
    tokens = subject.split(".")
    for place, token in enumerate(tokens):
        if pattern and (token == "*" or (token == ">" and place == len(tokens) - 1)):
            continue
        if token in ("*", ">"):
            problem = "> is not its last token" if pattern else "a pattern, not the subject of one event"
            raise ConfigError("subject", subject, problem, remedy)
        if _TOKEN.fullmatch(token) is None:
            raise ConfigError("subject", subject, "no subject of an event", remedy)
    return subject


def check_durable(key: str, name: object) -> str:
    """*name* of a durable consumer. Raises ConfigError."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ConfigError(key, name, "no name of a durable consumer", "use 1-63 of A-Z, a-z, 0-9 and hyphens")
    return name


def content_of(data: object, content_type: str, most_bytes: int) -> bytes:
    """The body of an event. Raises EventError for what cannot be sent, ConfigError for the content type."""
    if content_type not in CONTENT_TYPES:
        raise ConfigError("content_type", content_type, "unknown", f"use {' or '.join(CONTENT_TYPES)}")
    try:
        body = encode(data, content_type)
    except ContentError as error:
        raise EventError(f"the event cannot be sent: {error}", "publish what JSON can hold") from error
    if len(body) > most_bytes - HEADER_ROOM_BYTES:
        raise EventError(
            f"the event has {len(body)} bytes, more than the {most_bytes - HEADER_ROOM_BYTES} of a message",
            "publish a reference to it",
        )
    return body


def headers_of(
    message_id: str, key: str, content_type: str, headers: Mapping[str, str] | None
) -> dict[str, str]:
    """Those of a new event. Raises ConfigError."""
    made = _own_headers(headers) if headers else {}
    made[MESSAGE_ID] = _check_id(message_id)
    if key:
        made[KEY] = _quoted(key)
    if content_type != JSON:
        made[CONTENT_TYPE] = content_type
    return made


def _own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if _HEADER.fullmatch(name) is None or name.lower().startswith(("nats-", "phalanx-")):
            raise ConfigError(
                "headers", name, "no name for a header", "use letters, digits and -, not Nats-… or Phalanx-…"
            )
        if not isinstance(value, str) or not value.isprintable():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"headers[{name!r}]", value, "not one line of text", "encode it")
    if sum(len(name) + len(value) for name, value in headers.items()) > HEADER_ROOM_BYTES // 2:
        raise ConfigError(
            "headers", len(headers), f"more than {HEADER_ROOM_BYTES // 2} bytes", "put it into the data"
        )
    return dict(headers)


def _check_id(message_id: str) -> str:
    if not isinstance(message_id, str) or not message_id or len(message_id) > MAX_KEY:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError("message_id", message_id, "no id", f"use text of 1 to {MAX_KEY} characters")
    if not (message_id.isascii() and message_id.isprintable()) or " " in message_id:
        raise ConfigError("message_id", message_id, "no id", "use ASCII characters without spaces")
    return message_id


def _quoted(key: str) -> str:
    if not isinstance(key, str) or len(key) > MAX_KEY:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError("key", key, "no key", f"use text of up to {MAX_KEY} characters")
    return key if key.isalnum() and key.isascii() else quote(key, safe=_PLAIN)


def key_of(headers: Mapping[str, str]) -> str:
    """The key of an event; empty: it has none."""
    key = headers.get(KEY, "")
    return unquote(key) if "%" in key else key


def decoded(data: bytes, headers: Mapping[str, str], shape: Shape) -> Any:
    """The body of an event. Raises ContentError."""
    content_type = headers.get(CONTENT_TYPE, JSON)
    if content_type not in CONTENT_TYPES:
        raise ContentError(f"content type {content_type!r} is not known")
    return shape.decode(data, content_type)
