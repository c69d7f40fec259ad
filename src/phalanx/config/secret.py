"""A string that does not show itself."""

from __future__ import annotations

import hmac
from typing import Any, final

HIDDEN = "***"


@final
class Secret:
    """A string that ``repr``, ``str``, ``format`` and msgspec hide. Falsy when empty. Hashable, immutable.

    msgspec refuses to encode it unless it is given one of the hooks of this module:
    :func:`hide_secrets` for people, :func:`reveal_secrets` for another process of the same node.
    """

    __slots__ = ("_value",)
    _value: str

    def __init__(self, value: str = "") -> None:
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a Secret holds a str, not {type(value).__name__}")
        object.__setattr__(self, "_value", value)

    def reveal(self) -> str:
        """The secret itself."""
        return self._value

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Secret cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a Secret cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(
            self._value.encode(errors="replace"), other._value.encode(errors="replace")
        )

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __str__(self) -> str:
        return HIDDEN if self._value else ""

    def __repr__(self) -> str:
        return f"Secret({HIDDEN if self._value else ''})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Secret:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a Secret is not pickled; pass on what reveal() returns if you must")


def hide_secrets(value: object) -> object:
    """An ``enc_hook`` for msgspec: secrets become ``***`` (empty ones stay empty)."""
    if isinstance(value, Secret):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def reveal_secrets(value: object) -> object:
    """An ``enc_hook`` for msgspec: secrets in clear. Only for the socket between a node and its keeper."""
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def restore_secrets(kind: type, value: object) -> object:
    """The ``dec_hook`` that reads what :func:`reveal_secrets` wrote."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise NotImplementedError(f"cannot decode {kind.__name__}")
