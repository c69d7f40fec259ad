"""NATS's client protocol as we write and read it ourselves, compared with what nats-py does."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from nats.aio.client import Client
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError, ProtocolError
from nats.protocol.parser import Parser

from phalanx.bus.protocol import TURN_SECONDS, MessageParser, read_headers, write_headers, write_message
from phalanx.ports import Message

STREAM = (
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"MSG a.b 2 reply.to 0\r\n\r\n"
    b"HMSG a 1 r 23 28\r\nNATS/1.0\r\nA: b\r\nC:d\r\n\r\n+\r\n\r\n\r\n"
    b"-ERR 'Permissions Violation'\r\n"
    b"HMSG a 2 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b'INFO {"a": "' + 5000 * b"x" + b'"}\r\n'
    b"PONG\r\n"
    b"MSG big 1 70000\r\n" + 70000 * b"y" + b"\r\n"
    b"MSG a 1 6\r\nMSG a \r\n"
)


class _Client:
    """Takes what a parser finds."""

    is_connected = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def _process_msg(self, *args: Any) -> None:
        number, subject, reply, data, headers = args
        self.seen.append((number, subject, reply, data, headers or b""))

    async def _process_err(self, error: str) -> None:
        self.seen.append(error)

    async def _process_ping(self) -> None:
        self.seen.append("ping")

    async def _process_pong(self) -> None:
        self.seen.append("pong")

    async def _process_info(self, info: Any) -> None:
        self.seen.append(info)


async def _parsed(parser: Parser, size: int) -> None:
    for start in range(0, len(STREAM), size):
        await parser.parse(STREAM[start : start + size])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100, 4096, 1 << 20])
async def test_parser_finds_what_that_of_nats_py_finds(size: int) -> None:
    """A stream of everything, in pieces of any size."""
    theirs, ours = _Client(), _Client()
    await _parsed(Parser(theirs), 1 << 20)
    await _parsed(MessageParser(ours), size)
    assert ours.seen == theirs.seen
    assert len(ours.seen) == 10


async def test_direct_subscription_takes_messages_in_their_order() -> None:
    """Those of number 1 are taken at once, an exception in that is survived; the others go nats-py's way."""
    client, taken = _Client(), list[Message]()
    parser = MessageParser(client)

    def take(message: Message) -> None:
        taken.append(message)
        raise RuntimeError("must not end the connection")

    parser.direct[1] = take
    await _parsed(parser, 50)
    assert [len(m.data) for m in taken] == [5, 5, 70000, 6]
    assert taken[1] == Message("a", b"+\r\n\r\n", {"A": "b", "C": "d"}, "r")
    assert [each[0] for each in client.seen if isinstance(each, tuple)] == [2, 2]


@pytest.mark.parametrize("line", [b"NONSENSE\r\n", b"MSG a\r\n", b"MSG a b c\r\n", b"HMSG a 1 5\r\n"])
async def test_what_is_no_protocol_is_refused(line: bytes) -> None:
    """The connection is given up then, by nats-py."""
    with pytest.raises(ProtocolError):
        await MessageParser(_Client()).parse(line)


async def test_subject_that_is_not_utf_8_does_not_end_the_connection() -> None:
    """The message is dropped; what follows is read."""

    class Strict(_Client):
        async def _process_msg(self, *args: Any) -> None:
            args[1].decode()
            await super()._process_msg(*args)

    client, taken = Strict(), list[Message]()
    parser = MessageParser(client)
    parser.direct[1] = taken.append
    await parser.parse(b"MSG \xff 1 0\r\n\r\nMSG \xff 2 0\r\n\r\nMSG a 1 0\r\n\r\nMSG b 2 0\r\n\r\n")
    assert [message.subject for message in taken] == ["a"]
    assert [each[1] for each in client.seen] == [b"b"]


async def test_flood_of_messages_leaves_others_their_turns() -> None:
    """What is read without end, each message taken at once: signs of life are still sent."""
    parser, turns = MessageParser(_Client()), 0
    parser.direct[1] = lambda _: time.sleep(TURN_SECONDS / 2)

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(others())
    for _ in range(10):
        await parser.parse(b"MSG a 1 0\r\n\r\n" * 3)
    other.cancel()
    assert turns >= 9


async def test_what_had_come_of_a_message_is_forgotten_at_a_reset() -> None:
    """Another connection begins anew."""
    client = _Client()
    parser = MessageParser(client)
    await parser.parse(b"MSG a 1 10\r\nhal")
    parser.reset()
    await parser.parse(b"MSG b 1 2\r\nok\r\n")
    assert client.seen == [(1, b"b", b"", b"ok", b"")]


async def test_what_is_read_of_a_connection_that_was_given_up_is_dropped() -> None:
    """Half a message of it would swallow the first ones of the next connection, or be mixed with them."""
    client = _Client()
    parser = MessageParser(client)
    client.is_connected = False
    await parser.parse(b"MSG a 1 1000\r\nhal")
    client.is_connected = True
    await parser.parse(b"MSG b 1 2\r\nok\r\n")
    assert client.seen == [(1, b"b", b"", b"ok", b"")]


async def test_message_is_written_as_nats_py_does() -> None:
    """With and without reply and headers; odd values of headers are made harmless."""
    headers = {"A": " b ", "Two-Lines": "a\r\nX: y", "Umlaut": "ä", " ": "dropped", " C ": ""}
    sent = list[bytes]()

    class Sender(Client):
        async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
            sent.append(cmd)

    sender: Any = Sender()
    for reply in ("", "to.me"):
        for given in (None, headers):
            await sender._send_publish("a.b", reply, b"data", 4, given)
            head = write_headers(given) if given else b""
            assert write_message("a.b", reply, b"data", head, 1000) == sent[-1]
    assert read_headers(write_headers(headers)) == {"A": "b", "Two-Lines": "a  X: y", "Umlaut": "ä", "C": ""}


def test_what_cannot_be_sent_is_refused() -> None:
    """Nothing that would be a command of its own, and nothing that ends the connection."""
    for subject in ("", "a b", "a\r\nPUB x"):
        with pytest.raises(BadSubjectError):
            write_message(subject, "", b"", b"", 1000)
    for name in ("A:", "Ä", "a b", "a\r\nb"):
        with pytest.raises(BadHeaderError):
            write_headers({name: "x"})
    assert write_message("a", "", b"x" * 10, b"", 10)
    with pytest.raises(MaxPayloadError):
        write_message("a", "", b"x" * 11, b"", 10)
    with pytest.raises(MaxPayloadError):
        write_message("a", "", b"x", write_headers({"A": "b"}), 10)


async def test_headers_of_all_kinds_are_read_as_nats_py_reads_them() -> None:
    """Status lines with and without a description or headers behind them, and plain ones."""
    client: Any = Client()
    for block in (
        b"NATS/1.0\r\nA: b\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 404 No Messages\r\n\r\n",
        b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1016\r\n\r\n",
        b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\nX:\r\n\r\n",
    ):
        assert read_headers(block) == await client._process_headers(block), block
