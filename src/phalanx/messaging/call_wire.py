"""The wire format of calls: headers, error codes, the body of an error. See docs/calls.md.

A request is a core NATS request. Everything but its subject may be left out: a client that knows only NATS
sends JSON and reads the headers of an answer, of which those of an error are those of NATS micro (ADR-32).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from phalanx import errors
from phalanx.messaging.content import CONTENT_TYPES, JSON

log = logging.getLogger("phalanx.calls")

CONTENT_TYPE = "Content-Type"
"""``application/json`` (the default) or ``application/msgpack``; the answer comes in the same."""
CALL = "Phalanx-Call"
"""Of a request: ``id;timeout;epoch;caller``, see :class:`CallHeader`. One header, as each one costs time."""
ANSWER = "Phalanx-Answer"
"""Of an answer: ``node;epoch``, who has answered and under which epoch; 0 if it was not the active one."""
ERROR = "Phalanx-Error"
"""The code of an error; absent from an answer that is none."""
STREAM = "Phalanx-Stream"
"""Of a request: how many items the caller takes at first (1 to MAX_WINDOW); it wants a stream of answers.
Of an answer: ``number``, an item, counted from 1; ``number;alive``, ``number;end``, how many were sent."""
MAX_WINDOW = 1024
"""Items that may be on their way of one stream."""
MICRO_ERROR = "Nats-Service-Error"
MICRO_CODE = "Nats-Service-Error-Code"

DEFAULT_TIMEOUT_SECONDS = 5.0
"""For calls that say nothing."""

MOVED = "moved"
"""Not begun: this node does not lead (any more). Callers of ours go on to it; others may try again."""

_NUMBERS = {
    "unknown-app": 404,
    "unknown-method": 404,
    "no-handlers": 404,
    "wrong-route": 421,
    MOVED: 421,
    "wrong-type": 400,
    "wrong-kind": 400,
    "content-type": 415,
    "too-large": 413,
    "too-deep": 400,
    "busy": 429,
    "no-leader": 503,
    "no-instance": 503,
    "deadline": 504,
    "interrupted": 503,
    "failed": 500,
}
"""The numbers for ``Nats-Service-Error-Code``, as in HTTP; 400 for the codes of applications."""

_KINDS: dict[str, type[errors.CallError]] = {
    "unknown-app": errors.UnknownApp,
    "unknown-method": errors.UnknownMethod,
    "no-handlers": errors.NoHandlers,
    "wrong-route": errors.WrongRoute,
    "wrong-type": errors.WrongType,
    "wrong-kind": errors.WrongType,
    "content-type": errors.WrongType,
    "too-large": errors.TooLarge,
    "too-deep": errors.TooDeep,
    "busy": errors.Busy,
    "no-leader": errors.NoLeader,
    "no-instance": errors.NoInstance,
    "deadline": errors.CallTimeout,
    "interrupted": errors.OutcomeUnknown,
    "failed": errors.HandlerFailed,
}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an error, always JSON."""

    code: str
    message: str
    path: str = ""
    started: bool = False
    details: object = None


class Leading(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to ``who``: the leader as an instance knows it (empty: nobody), and what may be repeated.

    ``pattern``: that of the app. A pool has no leader, and any instance may be called. Nor has a ring:
    it has ``partitions``, and a call goes to the owner of its key's. ``nodes``: those that run it, and whose
    sessions live, as the instance knows them.
    """

    node: str = ""
    epoch: int = 0
    idempotent: tuple[str, ...] = ()
    pattern: str = "active-passive"
    partitions: int = 0
    nodes: tuple[str, ...] = ()


class CallHeader:
    """What a request says of itself; all of it may be missing.

    ``call_id``: in logs, and in a cancellation; unique, at most 64 characters. ``timeout_seconds``: how long
    the caller still waits, counted from the receipt (whole milliseconds on the wire). ``epoch``: only the
    leader of this reign, or of a later one, may begin it; None: it is not for the leader. ``caller``: a node
    id, or what a client calls itself; for logs, nobody has checked it.
    """

    __slots__ = ("call_id", "caller", "epoch", "timeout_seconds")

    def __init__(self, text: str) -> None:
        parts = text.split(";", 3)
        if len(parts) < 4:
            parts += [""] * (4 - len(parts))
        call_id, timeout, epoch, self.caller = parts
        self.call_id = call_id[:64]
        self.timeout_seconds = DEFAULT_TIMEOUT_SECONDS
        if timeout.isdecimal():
            self.timeout_seconds = min(int(timeout[:12]), 86_400_000) / 1000
        self.epoch: int | None = int(epoch[:18]) if epoch.isdecimal() else None


def call_header(call_id: str, timeout_seconds: float, epoch: int | None, caller: str) -> str:
    """The inverse."""
    milliseconds = max(1, int(1000 * timeout_seconds))
    return f"{call_id};{milliseconds};{'' if epoch is None else epoch};{caller}"


def answered_by(headers: Mapping[str, str]) -> tuple[str, int]:
    """Who has answered, and under which epoch; 0: not under one."""
    node, _, epoch = headers.get(ANSWER, "").partition(";")
    return node, int(epoch) if epoch.isdecimal() else 0


_encode = msgspec.json.Encoder(enc_hook=str).encode
_decode_problem = msgspec.json.Decoder(Problem).decode


_SHORT = 500
"""Characters of an error's message in a header, and of one that is too large as it is."""


def refusal(problem: Problem, most_bytes: int) -> tuple[bytes, dict[str, str]]:
    """Data, *most_bytes* at most, and headers of the answer that says *problem*: what of it can be sent."""
    code, message, path = _sendable(problem.code), _sendable(problem.message), _sendable(problem.path)
    if (code, message, path) != (problem.code, problem.message, problem.path):
        problem = msgspec.structs.replace(problem, code=code, message=message, path=path)
    try:
        data = _encode(problem)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        log.error("the details of error %s cannot be sent: %s", code, error)
        data = _encode(msgspec.structs.replace(problem, details=None))
    if len(data) > most_bytes:
        log.error("an error has %d bytes, of which most are not sent: %s", len(data), code)
        short = f"{message[:_SHORT]} (the rest fits into no message)"
        data = _encode(Problem(code[:_SHORT], short, path[:_SHORT], problem.started))
    return data, {
        CONTENT_TYPE: JSON,
        ERROR: code[:_SHORT],
        MICRO_ERROR: message[:_SHORT],
        MICRO_CODE: str(_NUMBERS.get(code, 400)),
    }


def _sendable(text: str) -> str:
    """*text* without halves of surrogate pairs, such as of a file's name, which are in no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def problem_of(data: bytes, headers: Mapping[str, str]) -> Problem | None:
    """The error that an answer is; None if it is none."""
    code = headers.get(ERROR)
    if code is None:
        return None
    try:
        return _decode_problem(data)
    except msgspec.MsgspecError:
        return Problem(code, headers.get(MICRO_ERROR, code), started=True)


def error_of(problem: Problem, app: str, method: str, node: str = "") -> errors.CallError:
    """The exception for *problem*."""
    kind = _KINDS.get(problem.code, errors.CallError)
    return kind(
        problem.code,
        problem.message,
        app=app,
        method=method,
        node=node,
        path=problem.path,
        started=problem.started,
        details=problem.details,
    )


def content_type_of(headers: Mapping[str, str]) -> str | None:
    """The content type of a message; None for one that is not ours to read."""
    given = headers.get(CONTENT_TYPE)
    if given is None:
        return JSON
    kind = given.partition(";")[0].strip().lower()
    return kind if kind in CONTENT_TYPES else None
