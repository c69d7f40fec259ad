"""What calls and events carry: values as JSON or MessagePack, checked against a declared type.

Types are msgspec structs, dataclasses, typed dicts, the plain ones, and pydantic models where pydantic is
installed (it is never imported here).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import msgspec

JSON = "application/json"
MSGPACK = "application/msgpack"
CONTENT_TYPES = (JSON, MSGPACK)

_PATH = re.compile(r"(?P<problem>.*) - at `(?P<path>\$.*)`", re.DOTALL)


class ContentError(Exception):
    """A value that cannot be sent, or is not what was declared. ``path``: where, ``$`` is all of it."""

    def __init__(self, problem: str, path: str = "$", *, too_deep: bool = False) -> None:
        self.problem, self.path, self.too_deep = problem, path, too_deep
        super().__init__(problem if path in ("", "$") else f"{problem} - at {path}")


def _plain(value: object) -> object:
    """What msgspec does not know: a pydantic model."""
    dump: Any = getattr(value, "model_dump", None)
    if dump is None or isinstance(value, type):
        raise TypeError(f"a value of type {type(value).__name__} cannot be sent")
    return dump(mode="json")


def _model(kind: Any, value: object) -> Any:
    """The inverse. pydantic's errors are ValueErrors, to which msgspec adds where in the whole it was."""
    try:
        return kind.model_validate(value)
    except ValueError as error:
        details: Any = getattr(error, "errors", None)
        if details is None:
            raise
        first: dict[str, Any] = details()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ValueError(f"{first['msg']}{f' (at {where})' if where else ''}") from error


_ENCODERS: dict[str, Callable[[object], bytes]] = {
    JSON: msgspec.json.Encoder(enc_hook=_plain).encode,
    MSGPACK: msgspec.msgpack.Encoder(enc_hook=_plain).encode,
}


def encode(value: object, content_type: str) -> bytes:
    """*value* as *content_type*, one of CONTENT_TYPES. Raises ContentError."""
    try:
        return _ENCODERS[content_type](value)
    except RecursionError:
        raise ContentError("it is nested too deeply", too_deep=True) from None
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise ContentError(str(error)) from error


class Shape:
    """A declared type, ready to decode both content types. Raises TypeError for one that cannot be sent."""

    def __init__(self, kind: Any) -> None:
        info = msgspec.inspect.type_info(kind)
        if isinstance(info, msgspec.inspect.CustomType) and not hasattr(info.cls, "model_validate"):
            raise TypeError(f"{getattr(kind, '__name__', kind)} is no type that can be sent")
        self._decoders: dict[str, Callable[[bytes], Any]] = {
            JSON: msgspec.json.Decoder(kind, dec_hook=_model).decode,
            MSGPACK: msgspec.msgpack.Decoder(kind, dec_hook=_model).decode,
        }

    def decode(self, data: bytes, content_type: str) -> Any:
        """The value in *data*. Raises ContentError."""
        try:
            return self._decoders[content_type](data)
        except RecursionError:
            raise ContentError("it is nested too deeply", too_deep=True) from None
        except msgspec.MsgspecError as error:
            found = _PATH.fullmatch(str(error))
            if found is not None:
                raise ContentError(found["problem"], found["path"]) from None
            raise ContentError(str(error)) from None
        except UnicodeDecodeError as error:
            raise ContentError(f"not UTF-8: {error.reason}") from None


@functools.lru_cache(maxsize=512)
def _cached(kind: Any) -> Shape:
    return Shape(kind)


def shape_of(kind: Any) -> Shape:
    """The shape of *kind*, made once. Raises TypeError."""
    try:
        return _cached(kind)
    except TypeError:
        return Shape(kind)  # not hashable, or it cannot be sent: that is said again
