"""A declaration as plain data that may be shown to anybody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from phalanx.config.reader import fields_of, tag_of
from phalanx.config.secret import HIDDEN, Secret
from phalanx.config.texts import Environment, HttpUrl, without_login


def redacted(config: msgspec.Struct) -> dict[str, Any]:
    """*config* as a dict of JSON types for /status and logs.

    Hidden are secrets, the values of environment variables, and logins in URLs. Arguments of commands
    are shown: whoever can list processes sees them anyway.
    """
    shown: dict[str, Any] = {}
    if tag := tag_of(type(config)):
        shown["type"] = tag
    for name, field in fields_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(field.about.rule, Environment):
            shown[name] = dict.fromkeys(value, HIDDEN)
        elif isinstance(field.about.rule, HttpUrl):
            shown[name] = without_login(value)
        elif name == "urls":
            shown[name] = [without_login(str(url)) for url in value]
        else:
            shown[name] = _plain(value)
    return shown


def _plain(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        return redacted(value)
    if isinstance(value, Secret):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[object]", value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(getattr(value, "__qualname__", type(value).__qualname__))
