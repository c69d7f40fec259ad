"""What calls and events carry: values as JSON or MessagePack, checked against a declared type.

Types are msgspec structs, dataclasses, typed dicts, the plain ones, and pydantic models where pydantic is
installed (it is never imported here).
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec

log = logging.getLogger("phalanx.calls")

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
    return dump(mode="json", by_alias=True)


class _InModel(ValueError):
    """What pydantic has found, and where in the model. msgspec adds where the model was in the whole."""

    def __init__(self, problem: str, path: str) -> None:
        self.path = path
        super().__init__(problem)


def _model(kind: Any, value: object) -> Any:
    """The inverse; from JSON, as strict models take texts for times only from there."""
    try:
        return kind.model_validate_json(msgspec.json.encode(value))
    except ValueError as error:
        details: Any = getattr(error, "errors", None)
        if details is None:
            raise
        first: dict[str, Any] = details(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise _InModel(first["msg"], path) from error


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
        for custom in _custom_types(msgspec.inspect.type_info(kind)):
            if not hasattr(custom, "model_validate_json"):
                raise TypeError(f"{getattr(custom, '__name__', custom)} is no type that can be sent")
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
            problem, path = (found["problem"], found["path"]) if found else (str(error), "$")
            if isinstance(error.__cause__, _InModel):
                path += error.__cause__.path
            raise ContentError(problem, path) from None
        except UnicodeDecodeError as error:
            raise ContentError(f"not UTF-8: {error.reason}") from None
        except Exception as error:
            # Code of the type itself, a validator: whoever has sent this must get an answer all the same.
            log.error("the type of a message has failed on it", exc_info=error)
            raise ContentError(f"its type has failed on it ({type(error).__name__})") from error


def _custom_types(info: object) -> Iterator[Any]:
    """All types in the description of one that msgspec leaves to others."""
    seen, left = set[int](), [info]
    while left:
        each: Any = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, msgspec.inspect.CustomType):
            yield each.cls
        elif isinstance(each, msgspec.inspect.Type | msgspec.inspect.Field):
            left.extend(getattr(each, name) for name in each.__struct_fields__)
        elif isinstance(each, tuple):
            left.extend(cast("tuple[object, ...]", each))


@functools.lru_cache(maxsize=512)
def _cached(kind: Any) -> Shape:
    return Shape(kind)


def shape_of(kind: Any) -> Shape:
    """The shape of *kind*, made once. Raises TypeError."""
    try:
        return _cached(kind)
    except TypeError:
        return Shape(kind)  # not hashable, or it cannot be sent: that is said again
