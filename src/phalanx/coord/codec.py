"""How the app's keys and values look in NATS: what may be a key, values as bytes, records as entries."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

import msgspec

from phalanx.errors import ConfigError, WrongValue
from phalanx.ports import Record

T = TypeVar("T")

MAX_KEY_LENGTH = 1024
"""Characters. The server takes 4096 bytes for a whole command line, subjects and reply included."""

_TOKEN = r"[-/_=a-zA-Z0-9]+"
_KEY = re.compile(rf"{_TOKEN}(?:\.{_TOKEN})*")
_PATTERN = re.compile(rf"(?:(?:{_TOKEN}|\*)\.)*(?:{_TOKEN}|\*|>)")


_PART_OF = {"*": r"[^.]+", ">": r".+"}


class Entry(msgspec.Struct, Generic[T], frozen=True):
    """A value as it is stored. ``time`` is Unix seconds by the server's clock (0 if unknown), for people."""

    removed: ClassVar[bool] = False
    key: str
    value: T
    revision: int
    time: float


class Removed(msgspec.Struct, frozen=True):
    """That a key was deleted, purged, or that its time was up. ``revision``: that of the marker, or of the
    last value where no marker was seen."""

    removed: ClassVar[bool] = True
    key: str
    revision: int
    time: float


Change: TypeAlias = Entry[T] | Removed
"""What history and watches consist of; ``removed`` tells the two apart, and so does ``match``."""

_to_json = msgspec.json.Encoder().encode


def check_key(key: str, *, what: str = "key") -> str:
    """*key*, if it may be one (NATS ADR-8). Raises ConfigError, which names *what* it was for."""
    # Users' code is not always typed.
    if not isinstance(key, str) or _KEY.fullmatch(key) is None or len(key) > MAX_KEY_LENGTH:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _bad_key(key, what)
    return key


def check_pattern(pattern: str) -> str:
    """*pattern*, if it may select keys: a key in which ``*`` stands for one part and a last ``>`` for all
    that follow. ``""`` is every key. Raises ConfigError."""
    if not pattern:
        return ">"
    if _PATTERN.fullmatch(pattern) is None or len(pattern) > MAX_KEY_LENGTH:
        raise ConfigError(
            "pattern",
            pattern,
            "is no key pattern",
            "use a key, with * for one whole part or > for all the rest, e.g. users.*.name or users.>",
        )
    return pattern


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a key matches *pattern*, which :func:`check_pattern` has returned."""
    parts = [_PART_OF.get(part, re.escape(part)) for part in pattern.split(".")]
    matches = re.compile(r"\.".join(parts)).fullmatch
    return lambda key: matches(key) is not None


def _bad_key(key: object, what: str) -> ConfigError:
    if isinstance(key, str) and len(key) > MAX_KEY_LENGTH:
        return ConfigError(
            what, key, f"has {len(key)} characters", f"use at most {MAX_KEY_LENGTH}, or a hash of it"
        )
    return ConfigError(
        what,
        key,
        "is no valid name in a NATS KV",
        "use a-z A-Z 0-9 - / _ = in parts separated by single dots, e.g. users.42.name",
    )


def encode(value: object, key: str) -> bytes:
    """Bytes as they are, str as UTF-8, anything else as JSON by msgspec. Raises WrongValue.

    *key* is for the error only.
    """
    match value:
        case bytes():
            return value
        case bytearray() | memoryview():
            return bytes(cast("bytearray", value))
        case str():
            try:
                return value.encode()
            except UnicodeEncodeError as error:
                raise WrongValue(key, f"the text is no Unicode: {error}", "store it as bytes") from error
        case _:
            return _encode_json(value, key)


def _encode_json(value: object, key: str) -> bytes:
    try:
        return _to_json(value)
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise WrongValue(
            key,
            f"a {type(value).__name__} can't be stored ({error or type(error).__name__})",
            "use bytes, str, a msgspec.Struct, a dataclass, or plain dict, list, int, float, bool",
        ) from error


def decode(data: bytes, wanted: type[T], key: str) -> T:
    """The inverse of :func:`encode` for a value of the type *wanted*, strictly: "1" is no int.

    Only the very types ``bytes`` and ``str`` are not JSON. Raises WrongValue.
    """
    if wanted is bytes:
        return cast("T", data)
    try:
        if wanted is str:
            return cast("T", data.decode())
        return _decoder(wanted).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WrongValue(
            key,
            f"what is stored is no {getattr(wanted, '__name__', wanted)} ({error})",
            "read it with the type that it was written with, or as bytes",
        ) from error
    except TypeError as error:
        raise WrongValue(
            key, f"{wanted!r} is no type that can be read ({error})", "use one that msgspec knows"
        ) from error


@lru_cache(256)
def _decoder(wanted: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(wanted, strict=True)


def change_of(record: Record, key: str, wanted: type[T]) -> Entry[T] | Removed:
    """*record* as a user sees it. Raises WrongValue."""
    time = record.time or _time(record.headers.get("Nats-Time-Stamp", ""))
    if record.removed:
        return Removed(key, record.revision, time)
    return Entry(key, decode(record.data, wanted, key), record.revision, time)


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0
