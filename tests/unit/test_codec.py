"""Keys and values of the app's KV, without NATS."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from phalanx.coord.codec import MAX_KEY_LENGTH, change_of, check_key, check_pattern, decode, encode
from phalanx.errors import ConfigError, WrongValue
from phalanx.ports import Record


class User(msgspec.Struct):
    name: str
    age: int = 0


@pytest.mark.parametrize(
    ("value", "wanted", "stored"),
    [
        (b"\x00\xff", bytes, b"\x00\xff"),
        ("grüße", str, "grüße".encode()),
        ("", str, b""),
        (5, int, b"5"),
        (1.5, float, b"1.5"),
        (True, bool, b"true"),
        (None, type(None), b"null"),
        ([1, 2], list[int], b"[1,2]"),
        ({"a": 1}, dict[str, int], b'{"a":1}'),
        (User("Eva", 3), User, b'{"name":"Eva","age":3}'),
    ],
)
def test_values_come_back(value: object, wanted: Any, stored: bytes) -> None:
    """What is stored is as documented, and comes back equal."""
    assert encode(value, "k") == stored
    assert decode(stored, wanted, "k") == value


def test_bytearray_is_bytes() -> None:
    """Other buffers are stored as the bytes they hold."""
    assert encode(bytearray(b"ab"), "k") == encode(memoryview(b"ab"), "k") == b"ab"


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (b'"1"', int),
        (b"1", bool),
        (b"", int),
        (b"\xff", str),
        (b"{}", User),
        (b"[1", list[int]),
        (b"1", object()),
    ],
)
def test_wrong_type_is_refused(stored: bytes, wanted: Any) -> None:
    """Decoding is strict, and says which key it was about."""
    with pytest.raises(WrongValue, match=r"key 'some\.key'"):
        decode(stored, wanted, "some.key")


@pytest.mark.parametrize("value", [object(), {1j: 2}, "\ud800", lambda: 1, {"a": {object()}}])
def test_what_cannot_be_stored_is_refused(value: object) -> None:
    """A value without an encoding is refused before anything is sent."""
    with pytest.raises(WrongValue, match=r"use bytes|as bytes"):
        encode(value, "k")


@pytest.mark.parametrize("key", ["a", "a.b-c/d_e=F.0", "x" * MAX_KEY_LENGTH])
def test_good_keys(key: str) -> None:
    """What NATS takes as a key is taken."""
    assert check_key(key) == key


@pytest.mark.parametrize(
    "key",
    ["", ".", ".a", "a.", "a..b", "a b", "a*", "*", ">", "a.>", "ä", "a\n", "a\r\nPUB x", None, 5, b"a"],
)
def test_bad_keys(key: Any) -> None:
    """No key can leave the app's own subjects, or break the protocol; the error names key and remedy."""
    with pytest.raises(ConfigError, match="in parts separated by single dots"):
        check_key(key)


def test_long_key() -> None:
    """The length is bounded."""
    with pytest.raises(ConfigError, match="at most 1024"):
        check_key("x" * (MAX_KEY_LENGTH + 1))


@pytest.mark.parametrize(
    ("pattern", "meaning"),
    [("", ">"), (">", ">"), ("a.>", "a.>"), ("a.*.c", "a.*.c"), ("*", "*"), ("*.>", "*.>"), ("a.b", "a.b")],
)
def test_good_patterns(pattern: str, meaning: str) -> None:
    """A pattern is a key with NATS wildcards for whole parts."""
    assert check_pattern(pattern) == meaning


@pytest.mark.parametrize("pattern", ["a*", "a.", ".>", ">.a", "a.>.b", "a b", "**", "a\n"])
def test_bad_patterns(pattern: str) -> None:
    """A wildcard for less than a part, or in the wrong place, is refused."""
    with pytest.raises(ConfigError, match="pattern"):
        check_pattern(pattern)


def test_time_of_a_live_change() -> None:
    """A republished message has its time in a header, with nanoseconds."""
    headers = {"Nats-Time-Stamp": "2026-01-01T00:00:00.123456789Z"}
    assert change_of(Record("s", b"x", 1, headers), "k", bytes).time == pytest.approx(1767225600.123456)
    assert change_of(Record("s", b"x", 1, {}), "k", bytes).time == 0
