"""What a single value may be. A rule turns a declared value into its normal form, or raises ConfigError.

Each rule has a ``shape``: the words in which the reference describes it. Rules about text are in ``texts``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

import msgspec

from phalanx.errors import ConfigError

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)")
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNIT_BYTES = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_WRITE_SECONDS = "write seconds (5 or 0.5) or 500ms, 5s, 2m, 1h, 7d"
_WRITE_BYTES = "write a number of bytes, or 64 MiB, 1 GB"


class Rule(Protocol):
    """What one field may hold."""

    @property
    def shape(self) -> str:
        """In words, for the reference."""
        ...

    def __call__(self, key: str, value: object) -> Any:
        """The value in its normal form. Raises ConfigError."""
        ...


class About(msgspec.Struct, frozen=True):
    """What the reference and the validation know of one field.

    ``default``: how the default is described where its value alone would not do.
    ``python_only``: cannot be written in TOML.
    """

    meaning: str
    rule: Rule
    default: str = ""
    trade_off: str = ""
    python_only: bool = False


def kind_of(value: object) -> str:
    """The word for a value's type in messages."""
    if value is None:
        return "None"
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
    name = type(value).__name__
    return words.get(name, f"of type {name}")


def seconds_text(value: float) -> str:
    """A duration as one would write it."""
    if not math.isfinite(value):
        return str(value)
    if value and value < 1:
        return f"{value * 1000:g} ms"
    for unit in ("d", "h", "m"):
        if value and value % _UNIT_SECONDS[unit] == 0:
            return f"{value / _UNIT_SECONDS[unit]:g} {unit}"
    return f"{value:g} s"


def parse_seconds(key: str, value: object) -> float:
    """Seconds from a number, or from text such as ``500ms``, ``5s``, ``1h``, ``7d``. Raises ConfigError."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None or len(value) > 32:
            raise ConfigError(key, value, "not a duration", _WRITE_SECONDS)
        return float(match[1]) * _UNIT_SECONDS[match[2]]
    return _number(key, value, _WRITE_SECONDS)


def _number(key: str, value: object, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(key, value, f"{kind_of(value)} is not a number", remedy)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(key, value, "not a finite number", remedy)
    return number


class Duration(msgspec.Struct, frozen=True):
    """Seconds as a float within a range, both ends included."""

    least: float
    most: float
    optional: bool = False

    @property
    def shape(self) -> str:
        return f"duration, {seconds_text(self.least)} to {seconds_text(self.most)}"

    def __call__(self, key: str, value: object) -> float | None:
        if value is None and self.optional:
            return None
        seconds = parse_seconds(key, value)
        if not self.least <= seconds <= self.most:
            side = "too short" if seconds < self.least else "too long"
            span = f"{seconds_text(self.least)} to {seconds_text(self.most)}"
            raise ConfigError(key, value, side, f"choose from {span}")
        return seconds


class Bytes(msgspec.Struct, frozen=True):
    """A number of bytes within a range, both ends included."""

    least: int
    most: int
    optional: bool = False

    @property
    def shape(self) -> str:
        return f"size, {size_text(self.least)} to {size_text(self.most)}"

    def __call__(self, key: str, value: object) -> int | None:
        if value is None and self.optional:
            return None
        count = _bytes(key, value)
        if not self.least <= count <= self.most:
            side = "too small" if count < self.least else "too large"
            raise ConfigError(
                key, value, side, f"choose from {size_text(self.least)} to {size_text(self.most)}"
            )
        return count


def _bytes(key: str, value: object) -> int:
    if isinstance(value, str):
        match = _BYTES.fullmatch(value.strip())
        if match is None or len(value) > 32 or match[2] not in _UNIT_BYTES:
            raise ConfigError(key, value, "not a size", _WRITE_BYTES)
        return int(float(match[1]) * _UNIT_BYTES[match[2]])
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(key, value, f"{kind_of(value)}, not a number of bytes", _WRITE_BYTES)
    return value


def size_text(value: int) -> str:
    """A number of bytes as one would write it, in the largest unit that it is a multiple of."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % _UNIT_BYTES[unit] == 0:
            return f"{value // _UNIT_BYTES[unit]} {unit}"
    return f"{value} B"


class Whole(msgspec.Struct, frozen=True):
    """An int within a range, both ends included."""

    least: int
    most: int
    optional: bool = False

    @property
    def shape(self) -> str:
        return f"whole number, {self.least} to {self.most}"

    def __call__(self, key: str, value: object) -> int | None:
        if value is None and self.optional:
            return None
        span = f"choose a whole number from {self.least} to {self.most}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(key, value, f"{kind_of(value)}, not a whole number", span)
        if not self.least <= value <= self.most:
            raise ConfigError(key, value, "out of range", span)
        return value


class Number(msgspec.Struct, frozen=True):
    """A float within a range, both ends included."""

    least: float
    most: float
    optional: bool = False

    @property
    def shape(self) -> str:
        return f"number, {self.least:g} to {self.most:g}"

    def __call__(self, key: str, value: object) -> float | None:
        if value is None and self.optional:
            return None
        span = f"choose a number from {self.least:g} to {self.most:g}"
        number = _number(key, value, span)
        if not self.least <= number <= self.most:
            raise ConfigError(key, value, "out of range", span)
        return number


class Switch(msgspec.Struct, frozen=True):
    """True or false."""

    @property
    def shape(self) -> str:
        return "true or false"

    def __call__(self, key: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(key, value, f"{kind_of(value)}, not a switch", "write true or false")
        return value


class Choice(msgspec.Struct, frozen=True):
    """One of a few values."""

    values: tuple[str | int, ...]
    optional: bool = False

    @property
    def shape(self) -> str:
        return alternatives([f"`{v}`" if isinstance(v, str) else str(v) for v in self.values])

    def __call__(self, key: str, value: object) -> str | int | None:
        if value is None and self.optional:
            return None
        for choice in self.values:
            if type(value) is type(choice) and value == choice:
                return choice
        options = [repr(v) if isinstance(v, str) else str(v) for v in self.values]
        raise ConfigError(key, value, "not one of the choices", f"choose {alternatives(options)}")


def alternatives(options: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join(", ".join(options).rsplit(", ", 1))


class Span(msgspec.Struct, frozen=True):
    """Two whole numbers, the first not above the second."""

    least: int
    most: int

    @property
    def shape(self) -> str:
        return f"list of two, lowest and highest, {self.least} to {self.most}"

    def __call__(self, key: str, value: object) -> tuple[int, int]:
        remedy = f"write two, lowest first, such as ({self.least * 2}, {self.least * 4 - 1})"
        given = value
        items = list(cast("Sequence[object]", value)) if isinstance(value, list | tuple) else []
        if len(items) != 2 or any(type(item) is not int for item in items):
            raise ConfigError(key, given, "not two whole numbers", remedy)
        low, high = cast("list[int]", items)
        if not self.least <= low <= high <= self.most:
            raise ConfigError(key, given, f"not a range within {self.least} to {self.most}", remedy)
        return low, high


class Function(msgspec.Struct, frozen=True):
    """Something to call."""

    @property
    def shape(self) -> str:
        return "function without arguments, sync or async"

    def __call__(self, key: str, value: object) -> Any:
        if not callable(value):
            raise ConfigError(
                key, value, f"{kind_of(value)}, not a function", "pass a function without arguments"
            )
        return value


class Nested(msgspec.Struct, frozen=True):
    """Another declaration, which validates itself field by field (see validate)."""

    words: str

    @property
    def shape(self) -> str:
        return self.words

    def __call__(self, key: str, value: object) -> NoReturn:
        raise AssertionError(f"{key} is validated by its own declaration")
