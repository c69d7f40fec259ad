"""The base of all declarations: one that is called wrongly says what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from phalanx.errors import ConfigError


def unknown_key(
    place: str, name: object, value: object, known: Iterable[str], *, secret: bool
) -> ConfigError:
    """The error for a key that no declaration has. *secret*: text that is given for it is not shown."""
    known = tuple(known)
    near = difflib.get_close_matches(str(name), known, 1)
    remedy = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
    if not isinstance(value, bool | int | float | str) or (secret and isinstance(value, str)):
        value = "(not shown)"  # tables may hold secrets too
    return ConfigError(f"{place}.{name}" if place else str(name), value, "unknown key", remedy)


class _Strict(msgspec.StructMeta):
    """Raises ConfigError where Python would raise TypeError: wrong declarations are users' everyday errors.

    Type checkers don't see this, so that they go on to check the arguments.
    """

    if not TYPE_CHECKING:

        def __call__(cls, *arguments: Any, **fields: Any) -> Any:  # noqa: N805 - of a metaclass
            for name, value in fields.items():
                if name not in cls.__struct_fields__:
                    raise unknown_key(cls.__name__, name, value, cls.__struct_fields__, secret=True)
            try:
                return super().__call__(*arguments, **fields)
            except TypeError as error:
                remedy = f"{cls.__name__} takes {', '.join(cls.__struct_fields__)}"
                raise ConfigError(cls.__name__, "(arguments)", str(error), remedy) from None


class Declaration(msgspec.Struct, frozen=True, metaclass=_Strict):
    """Something that users declare. Only its names are checked when it is made, its values in ``build``."""
