"""Structured logs: one line per event, for people (console) or for machines (JSON).

Fields beside the message are given as ``extra``::

    log.info("became active", extra={"app": "wiki", "epoch": 12, "duration_seconds": 0.031})

Only the tree of the logger ``phalanx`` is touched; the user's own logging stays as it is.

A log that nobody reads (a full pipe, a stopped terminal) must not stop the node: writing waits for a tenth
of a second at most, once, and from then on lines are dropped until there is room again. Then a line says
how many are missing. (The room is asked for before each write. If another process fills the same pipe in
that very moment the write does block: for a node that can't be excluded without making the pipe
non-blocking for all who share it. A keeper has its standard error to itself: :func:`unblock_stderr`.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from phalanx.config import Logging
from phalanx.config.secret import hide_secrets

ROOT = "phalanx"
FIELDS = ("app", "epoch", "session", "duration_seconds")
"""The usual extra fields, in the order in which they are shown. Others follow them."""

_WAIT_SECONDS = 0.1
_ATOMIC_BYTES = 4096
"""A pipe that is ready takes that many bytes without blocking (PIPE_BUF, pipe(7))."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_RESERVED = frozenset({"time", "level", "logger", "message", "platform", "node", "exc"})
_COLORS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}


def configure_logging(
    config: Logging, *, platform: str, node: str, stream: TextIO | None = None
) -> Callable[[], None]:
    """Write the log of Phalanx to *stream* (default: standard error) as *config* says.

    Calling it again replaces what the last call set up. Returns a function that puts everything back to
    what it was before the first call; it does nothing if a later call has replaced this one.
    """
    global _current
    if _current is None:
        before = _Before()
    else:
        before, old = _current
        logging.getLogger(ROOT).removeHandler(old)
    target = sys.stderr if stream is None else stream
    if config.format == "json":
        formatter: logging.Formatter = _JsonFormatter(platform, node)
    else:
        formatter = _ConsoleFormatter(color=_wants_color(target))
    handler = _Handler(target)
    handler.setFormatter(formatter)
    root = logging.getLogger(ROOT)
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(config.level.upper())
    _current = (before, handler)

    def undo() -> None:
        global _current
        if _current is not None and _current[1] is handler:
            _current = None
            before.restore()

    return undo


def unblock_stderr() -> None:
    """From now on nothing that this process writes to standard error can block it; it is lost instead.

    For a process that does nothing else than what must not wait (the keeper). The mode of a pipe or terminal
    belongs to all who share it, so this process opens its own. A socket (systemd's journal) can't be opened
    again; what the log writes there doesn't wait, see :class:`_Handler`. Files are left as they are.
    """
    try:
        if not (stat.S_ISFIFO(mode := os.fstat(2).st_mode) or stat.S_ISCHR(mode)):
            return
        own = os.open("/dev/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:  # closed, or the pipe of another user: the log asks for room before it writes
        logging.getLogger(ROOT).debug("standard error stays as it is: %s", error)
        return
    os.dup2(own, 2)
    os.close(own)


def plain_handler() -> logging.Handler:
    """A handler for standard error in console form that never raises and never blocks for long."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_ConsoleFormatter(color=_wants_color(sys.stderr)))
    return handler


class _Before:
    """How the logger was before we touched it."""

    def __init__(self) -> None:
        root = logging.getLogger(ROOT)
        self._state = (root.level, root.propagate, list(root.handlers))

    def restore(self) -> None:
        root = logging.getLogger(ROOT)
        level, root.propagate, root.handlers = self._state
        root.setLevel(level)


_current: tuple[_Before, logging.Handler] | None = None


class _Handler(logging.Handler):
    """Writes lines, and never raises nor blocks for long. ``lost``: lines dropped since the last one."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._write_some = _writer(self._descriptor)
        self._torn = False
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a log call with wrong arguments must not end what it reports on
            line = f"log message could not be formatted: {record.name} {record.msg!r} ({error!r})"
        if self.lost:
            line = f"{self._lost_line()}\n{line}"
        if self._write(f"{line}\n".encode(errors="backslashreplace")):
            self.lost = 0
        else:
            self.lost += 1

    def _lost_line(self) -> str:
        record = logging.makeLogRecord(
            {
                "name": "phalanx.log",
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": f"{self.lost} log lines are lost: nobody read them",
            }
        )
        return self.format(record)

    def _write(self, data: bytes) -> bool:
        try:
            if self._descriptor is None:
                self._stream.write(data.decode())
                self._stream.flush()
                return True
            return self._write_all(self._descriptor, data)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False

    def _write_all(self, descriptor: int, data: bytes) -> bool:
        """Whether all of *data* was written. A line that went out only in part is ended before the next."""
        patience = 0.0 if self.lost else _WAIT_SECONDS
        deadline = time.monotonic() + patience
        rest = memoryview(b"\n" + data if self._torn else data)
        whole = len(rest)
        while rest:
            if not _has_room(descriptor, deadline - time.monotonic()):
                self._torn |= len(rest) < whole
                return False
            try:
                rest = rest[self._write_some(rest[:_ATOMIC_BYTES]) :]
            except BlockingIOError:  # it does not block, and somebody else was faster
                if time.monotonic() >= deadline:
                    self._torn |= len(rest) < whole
                    return False
        self._torn = False
        return True


def _has_room(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(max(0, int(seconds * 1000))))


def _writer(descriptor: int | None) -> Callable[[memoryview], int]:
    """What writes some bytes there; to a socket never blocking, whoever shares it."""
    if descriptor is None:
        return len
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return functools.partial(_send, descriptor)
    return functools.partial(os.write, descriptor)


def _send(descriptor: int, data: memoryview) -> int:
    borrowed = socket.socket(fileno=descriptor)
    try:
        return borrowed.send(data, socket.MSG_DONTWAIT)
    finally:
        borrowed.detach()


def _descriptor(stream: TextIO) -> int | None:
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


class _JsonFormatter(logging.Formatter):
    """One JSON object a line. ``time`` is RFC 3339, UTC, with milliseconds."""

    def __init__(self, platform: str, node: str) -> None:
        super().__init__()
        self._platform, self._node = platform, node
        self._encode = msgspec.json.Encoder(enc_hook=_as_text).encode

    def format(self, record: logging.LogRecord) -> str:
        extra = _extra(record)
        shown: dict[str, Any] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            # Several nodes may live in one process; then whoever logs says which it is.
            "platform": extra.pop("platform", self._platform),
            "node": extra.pop("node", self._node),
        }
        shown.update((key, value) for key, value in extra.items() if key not in _RESERVED)
        if text := _traceback(record):
            shown["exc"] = text
        try:
            return self._encode(shown).decode()
        except (TypeError, ValueError, NotImplementedError, RecursionError):
            # Keys that JSON has not, lone surrogates, and the like.
            return self._encode({key: _clean(value) for key, value in shown.items()}).decode()


class _ConsoleFormatter(logging.Formatter):
    """``12:34:56.789 INFO  session: renewed app=wiki epoch=12``, in local time."""

    def __init__(self, *, color: bool) -> None:
        super().__init__()
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        head = (
            f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d} "
            f"{record.levelname:<7} {record.name.removeprefix(f'{ROOT}.')}: "
        )
        message = _printable(record.getMessage())
        line = head + message
        # Most messages name their app and epoch already: "app wiki: active (epoch 12)".
        fields = " ".join(
            f"{key}={_short(value)}"
            for key, value in _extra(record).items()
            if value and f"{key} {value}" not in message
        )
        if fields:
            line += f"  {fields}"
        if self._color and level in _COLORS:
            line = f"\x1b[{_COLORS[level]}m{line}\x1b[0m"
        if text := _traceback(record):
            line += "\n" + "\n".join(f"    {_printable(each)}" for each in text.splitlines())
        return line


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``, the usual fields first. None says that there is nothing to say."""
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD and value is not None}
    first = {key: given.pop(key) for key in FIELDS if key in given}
    return {**first, **given}


def _traceback(record: logging.LogRecord) -> str:
    parts: list[str] = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _rfc3339(unix_seconds: float) -> str:
    text = datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _as_text(value: object) -> object:
    """For values that JSON has not. Secrets stay hidden wherever they are."""
    with contextlib.suppress(NotImplementedError):
        return hide_secrets(value)
    return str(value)


def _clean(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, int) or -(2**63) <= value < 2**64 else str(value)
    return str(value).encode(errors="backslashreplace").decode()


def _short(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else _printable(str(value))
    return f'"{text}"' if " " in text or not text else text


def _printable(text: str) -> str:
    """Control characters are shown as escapes: what others send must not look like lines of ours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _wants_color(stream: TextIO) -> bool:
    try:
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False
