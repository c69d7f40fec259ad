"""What node and keeper say to each other survives the way, and shows no secret."""

from __future__ import annotations

import pytest

from phalanx.config import NatsOptions, Secret
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.keeper import wire
from phalanx.types import Resource, SessionId

LOGINS = [
    NatsOptions(user="u", password="hush-hush"),
    NatsOptions(token="hush-hush"),
    NatsOptions(nkey_seed="hush-hush"),
]


def start(nats: NatsOptions) -> wire.Start:
    """The first message, with these options."""
    streams = StreamList(1, ("a", "b", "c"))
    return wire.Start("prod", SessionId("n1", "x"), streams, Timing(), nats, "/state", "host")


def the_line(data: bytes) -> bytes:
    """The one line that *data* is."""
    [line] = wire.Lines().feed(data)
    return line


@pytest.mark.parametrize("nats", LOGINS)
def test_every_way_to_log_in_reaches_the_keeper(nats: NatsOptions) -> None:
    """A password, token or seed arrives as it was sent, and as a Secret again."""
    message = start(nats)
    assert wire.decode_from_node(the_line(wire.encode(message))) == message


@pytest.mark.parametrize("nats", LOGINS)
def test_no_repr_of_the_first_message_shows_a_secret(nats: NatsOptions) -> None:
    """Neither what is sent nor what arrives shows its secret in a log line or a traceback."""
    sent = start(nats)
    arrived = wire.decode_from_node(the_line(wire.encode(sent)))
    for shown in (repr(sent), str(sent), repr(arrived), f"{arrived}"):
        assert "hush-hush" not in shown
        assert "***" in shown


def test_secrets_are_restored_as_secrets_even_when_empty() -> None:
    """Options without any login arrive with empty secrets, not with None or text."""
    arrived = wire.decode_from_node(the_line(wire.encode(start(NatsOptions()))))
    assert isinstance(arrived, wire.Start)
    assert arrived.nats.password == Secret()


def test_lines_are_cut_wherever_the_socket_cut_them() -> None:
    """Two messages that arrive byte by byte come out as two."""
    first, second = wire.Beat(), wire.Register(7, Resource("s1", "wiki", "process", 3, pgid=9))
    lines, seen = wire.Lines(), list[wire.FromNode]()
    for byte in wire.encode(first) + wire.encode(second):
        seen += [wire.decode_from_node(line) for line in lines.feed(bytes([byte]))]
    assert seen == [first, second]


def test_a_line_without_end_is_refused() -> None:
    """Somebody who sends no line end cannot fill the keeper's memory."""
    lines = wire.Lines()
    with pytest.raises(ValueError, match="a line of more than"):
        list(lines.feed(b"x" * (wire.MAX_LINE_BYTES + 1)))


@pytest.mark.parametrize(
    "message",
    [
        wire.Established(),
        wire.ValidUntil(1.5, 3),
        wire.Refused(2, "No space left on device"),
        wire.Lost("why"),
        wire.Released(True),
    ],
)
def test_what_the_keeper_says_reaches_the_node(message: wire.FromKeeper) -> None:
    """Every message of the keeper comes back equal."""
    assert wire.decode_from_keeper(the_line(wire.encode(message))) == message
