"""The client protocol of NATS, as far as speed matters: messages that are sent and that come.

nats-py's own way costs several times as much for each message: a regular expression for each kind of line, a
queue and a task for each subscription, a future and another task for what is sent. All but messages (INFO,
PING, errors) is read by nats-py's parser. The format is that of nats-server's documentation ("NATS Protocol",
ADR-4 for headers).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError, ProtocolError
from nats.protocol.parser import Parser

from phalanx.ports import Message

log = logging.getLogger("phalanx.nats")

TURN_SECONDS = 0.01
"""After so long with what was read at once others have a turn: more may have come meanwhile, without end."""

_CRLF = b"\r\n"
_VERSION = "NATS/1.0"
_FIRST_LINE = f"{_VERSION}\r\n"
_MESSAGES = (b"MSG ", b"HMSG ")
_WITH_REPLY = {b"MSG": 5, b"HMSG": 6}
"""How many words the line of a message has that has a reply subject; one less without."""

_odd_in_subject = re.compile(r"[ \t\r\n]").search
_header_name = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_good_names: set[str] = set()
"""Names of headers that were looked at, as there are few."""
_NEW_LINES = str.maketrans({"\r": " ", "\n": " "})

Direct = Callable[[Message], None]
"""Takes a message at once, as it is read. Must neither wait nor take long."""


def write_message(subject: str, reply: str, data: bytes, head: bytes, most: int) -> bytes:
    """The command that publishes it. *head*: the block of its headers, empty if it has none. *reply* is an
    inbox of the client's own making, which is not checked.

    Raises BadSubjectError, and MaxPayloadError if headers and data are more than *most* bytes, over which the
    server would end the connection.
    """
    if not subject or _odd_in_subject(subject):
        raise BadSubjectError
    size = len(data) + len(head)
    kind, sizes = ("HPUB", f"{len(head)} {size}") if head else ("PUB", str(size))
    if size > most:
        raise MaxPayloadError
    return b"%b%b%b\r\n" % (f"{kind} {subject} {reply} {sizes}\r\n".encode(), head, data)


def write_headers(headers: Mapping[str, str]) -> bytes:
    """The block of *headers*. Raises BadHeaderError for a name that cannot be one.

    As nats-py has it: a value is stripped, and a line break in it becomes a space.
    """
    lines = _FIRST_LINE
    for name, value in headers.items():
        if name not in _good_names:
            name = name.strip()
            if not name:
                continue
            if _header_name(name) is None:
                raise BadHeaderError(name)
            _remember(name)
        value = value.strip()
        if not value.isprintable():
            value = value.translate(_NEW_LINES)
        lines += f"{name}: {value}\r\n"
    return (lines + "\r\n").encode()


def read_headers(block: bytes) -> dict[str, str]:
    """The inverse; the status of a message without content is in ``Status`` and ``Description``."""
    text = block.decode("utf-8", "replace")
    headers: dict[str, str] = {}
    if text.startswith(_FIRST_LINE) and text.endswith("\r\n\r\n"):
        return read_header_lines(text[len(_FIRST_LINE) : -4], headers)
    first, _, rest = text.partition("\r\n")
    if first != _VERSION:
        status, _, description = first[len(_VERSION) :].strip().partition(" ")
        if status.isdigit():
            headers["Status"] = status
        if description:
            headers["Description"] = description.strip()
    return read_header_lines(rest, headers)


def read_header_lines(lines: str, headers: dict[str, str]) -> dict[str, str]:
    """Put what *lines* say into *headers*."""
    for line in lines.split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            if name not in _good_names:
                name = name.strip()
                if not name.isascii() or name.split() != [name]:
                    continue
                if _header_name(name) is not None:
                    _remember(name)
            headers[name] = value.strip()
    return headers


def _remember(name: str) -> None:
    if len(_good_names) < 256:
        _good_names.add(name)


class MessageParser(Parser):
    """nats-py's parser, which reads messages by itself. ``direct``: who takes those of a subscription at
    once, by its number; all others take nats-py's way, through its queue to its task."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.direct: dict[int, Direct] = {}
        self._begun = bytearray()
        """What has come of a message, or of a line, that is not whole."""
        self._wanted = 0
        """How long that is at least, when it is whole."""
        self._resets = 0
        self._block, self._headers = b"", MappingProxyType[str, str]({})
        """The headers that were read last: those of answers are often all alike."""
        untyped: Any = super()
        untyped.__init__(client)

    def reset(self) -> None:
        """Another connection begins."""
        super().reset()
        self._begun.clear()
        self._wanted = 0
        self._resets += 1

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read. Raises ProtocolError."""
        if not self.client.is_connected:
            return  # read of a connection that was given up just now: the next one must not begin with it
        if self._begun:
            self._begun += data
            if len(self._begun) < self._wanted:
                return
            data = bytes(self._begun)
            self._begun.clear()
        self._wanted = 0
        began = time.monotonic()
        resets, start, end = self._resets, 0, len(data)
        while start < end:
            line_end = data.find(_CRLF, start)
            if line_end < 0:
                break
            if data.startswith(_MESSAGES, start):
                try:
                    words = data[start:line_end].split(b" ")  # a subject may hold other white space
                    number, size = int(words[2]), int(words[-1])
                    head = int(words[-2]) if words[0] == b"HMSG" else 0
                    with_reply = _WITH_REPLY[words[0]]
                    reply = words[3] if len(words) == with_reply else b""
                    if len(words) < with_reply - 1:
                        raise ValueError
                except (ValueError, LookupError):
                    raise ProtocolError("nats: malformed MSG") from None
                body = line_end + 2
                after = body + size + 2
                if after > end:
                    self._wanted = after - start
                    break
                block, content = data[body : body + head], data[body + head : body + size]
                direct = self.direct.get(number)
                if direct is not None:
                    self._take(direct, words[1], reply, content, block)
                else:
                    try:
                        await self.client._process_msg(number, words[1], reply, content, block)
                    except Exception:
                        # Anybody can send what nats-py does not expect: a subject that is not UTF-8,
                        # headers that are none. It would read nothing any more.
                        log.exception("a message on %r was dropped", words[1])
            else:
                after = line_end + 2
                try:
                    await super().parse(data[start:after])
                except (AttributeError, LookupError, ValueError) as error:
                    # nats-py would read nothing any more, and not say so.
                    raise ProtocolError(f"nats: malformed line: {error}") from error
                if self.buf and self._resets == resets:
                    raise ProtocolError("nats: unknown protocol")
            if self._resets != resets:
                return  # what is left of data is of a connection that is gone
            start = after
        if start < end:
            self._begun += data[start:]
        if time.monotonic() - began > TURN_SECONDS:
            await asyncio.sleep(0)

    def _take(self, direct: Direct, subject: bytes, reply: bytes, data: bytes, block: bytes) -> None:
        try:
            if block != self._block:
                self._headers = MappingProxyType(read_headers(block) if block else {})
                self._block = block
            direct(Message(subject.decode(), data, self._headers, reply.decode()))
        except Exception:
            log.exception("a message on %r could not be handled", subject)


__all__ = ["Direct", "MessageParser", "read_header_lines", "read_headers", "write_headers", "write_message"]
