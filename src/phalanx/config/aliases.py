"""Types of fields that may be written in more ways than one: ``"5s"`` for 5.0, text for a command."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from phalanx.config.secret import Secret

if TYPE_CHECKING:
    # Type checkers take what __set__ accepts as the parameter of the constructor, and what __get__
    # returns as the type of the attribute (dataclass_transform with descriptors).
    class Seconds:
        def __get__(self, instance: object, owner: object = None) -> float: ...
        def __set__(self, instance: Any, value: float | str) -> None: ...

    class MaybeSeconds:
        def __get__(self, instance: object, owner: object = None) -> float | None: ...
        def __set__(self, instance: Any, value: float | str | None) -> None: ...

    class CommandLine:
        def __get__(self, instance: object, owner: object = None) -> tuple[str, ...]: ...
        def __set__(self, instance: Any, value: str | Sequence[str]) -> None: ...

    class Texts:
        def __get__(self, instance: object, owner: object = None) -> tuple[str, ...]: ...
        def __set__(self, instance: Any, value: Sequence[str]) -> None: ...

    class ByteCount:
        def __get__(self, instance: object, owner: object = None) -> int: ...
        def __set__(self, instance: Any, value: int | str) -> None: ...

    class MaybeByteCount:
        def __get__(self, instance: object, owner: object = None) -> int | None: ...
        def __set__(self, instance: Any, value: int | str | None) -> None: ...

    class PathText:
        def __get__(self, instance: object, owner: object = None) -> str: ...
        def __set__(self, instance: Any, value: str | PathLike[str]) -> None: ...

    class SecretText:
        def __get__(self, instance: object, owner: object = None) -> Secret: ...
        def __set__(self, instance: Any, value: Secret | str) -> None: ...
else:
    Seconds = float
    MaybeSeconds = float | None
    CommandLine = tuple[str, ...]
    Texts = tuple[str, ...]
    ByteCount = int
    MaybeByteCount = int | None
    PathText = str
    SecretText = Secret


def default(value: object) -> Any:
    """A default, for fields whose alias is not the type of their value."""
    return value
