"""What JetStream's API is sent and answers: headers of writes, acknowledgements, refusals, stored messages.

The formats are those of nats-server's documentation: ADR-1 (errors), ADR-31 (direct get), ADR-43 (TTL of a
message), ADR-50 (atomic batches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from nats.aio.msg import Msg

from phalanx.errors import BusError, BusUnavailable, WrongRevision
from phalanx.ports import BATCH_INCOMPLETE, BATCHES_UNDER_WAY, Fence, Message, Record, Write, is_removed

WRONG_LAST_SEQUENCE = (10071, 10164)
"""JSStreamWrongLastSequenceErrF, and its constant form: another compare-and-set is under way."""

NO_MESSAGE_FOUND = 10037


class ApiError(msgspec.Struct):
    """``err_code`` is JetStream's own, ``code`` like HTTP's."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Ack(msgspec.Struct):
    """The answer to a write: the sequence that it got, or why it was refused."""

    seq: int = 0
    error: ApiError | None = None


class Stored(msgspec.Struct):
    """A message as it is stored; ``data`` and ``hdrs`` in base64."""

    subject: str
    seq: int
    time: str = ""
    data: str = ""
    hdrs: str = ""


class GetReply(msgspec.Struct):
    """The answer to a read."""

    message: Stored | None = None
    error: ApiError | None = None


decode_ack = msgspec.json.Decoder(Ack).decode
decode_get = msgspec.json.Decoder(GetReply).decode
decode_any = msgspec.json.Decoder(dict[str, Any]).decode
encode = msgspec.json.Encoder().encode


def write_headers(headers: Mapping[str, str] | None, ttl_seconds: float | None) -> dict[str, str]:
    """Those of a message that is written: *headers*, and for how long it stays."""
    written = dict(headers) if headers else {}
    if ttl_seconds is not None:
        written["Nats-TTL"] = f"{max(1, math.ceil(ttl_seconds))}s"  # ADR-43: whole seconds
    return written


def batch_headers(write: Write, batch: str, number: int, fence: Fence | None) -> dict[str, str]:
    """Those of message *number*, from 1, of *batch* (ADR-50). The first one carries the fence."""
    headers = write_headers(write.headers, write.ttl_seconds)
    if fence is not None and number == 1:
        headers.update(fence_headers(fence))
    return {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}


def batch_refusal(operation: str, error: ApiError, fence: Fence | None) -> BusError:
    """What to raise for *error* in the middle of a batch, or at its end."""
    if error.err_code in (BATCH_INCOMPLETE, BATCHES_UNDER_WAY):
        return BusUnavailable(operation, error.description, error.err_code)
    return refusal(operation, error, fence.subject if fence else "", fence.revision if fence else 0)


def fence_headers(fence: Fence) -> dict[str, str]:
    """Have the server refuse the message unless the leader key is as *fence* has it."""
    return {
        "Nats-Expected-Last-Subject-Sequence": str(fence.revision),
        "Nats-Expected-Last-Subject-Sequence-Subject": fence.subject,
    }


def refusal(operation: str, error: ApiError, subject: str, expected: int) -> BusError:
    """What to raise for *error*: WrongRevision of *subject* where that is what it means."""
    if error.err_code not in WRONG_LAST_SEQUENCE:
        return BusError(operation, error.description, error.err_code)
    number = error.description.rpartition(":")[2].strip()
    return WrongRevision(subject, expected, int(number) if number.isdigit() else None)


def message_of(msg: Msg) -> Message:
    """nats-py's message, as the port has it."""
    return Message(msg.subject, msg.data, msg.headers or {}, msg.reply)


def status_of(msg: Msg) -> str | None:
    """The status line of a message without content (``204 EOB``), None for any other."""
    headers = msg.headers
    if headers is None or "Status" not in headers or "Nats-Sequence" in headers:
        return None  # what is stored may have a header of that name too
    return f"{headers['Status']} {headers.get('Description', '')}".strip()


def direct_record(msg: Msg) -> Record:
    """An answer to a direct get (ADR-31)."""
    headers = msg.headers or {}
    return Record(
        headers["Nats-Subject"],
        msg.data,
        int(headers["Nats-Sequence"]),
        headers,
        time_of(headers.get("Nats-Time-Stamp", "")),
        is_removed(headers),
    )


def time_of(text: str) -> float:
    """Unix seconds; 0 for what is no time."""
    try:
        # Nanoseconds are more than fromisoformat of Python 3.11 takes.
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def parse_headers(raw: bytes) -> dict[str, str]:
    """The headers of a stored message, without their first line."""
    lines = raw.decode(errors="replace").split("\r\n")[1:]
    return {
        name.strip(): value.strip()
        for name, separator, value in (line.partition(":") for line in lines)
        if separator
    }
