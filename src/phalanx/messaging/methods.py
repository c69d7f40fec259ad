"""What a method of an app may be called: one token of a subject, and a name in most languages."""

from __future__ import annotations

import re

from phalanx.errors import ConfigError

_is_method = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}").fullmatch


def check_method(key: str, name: object) -> None:
    """Raises ConfigError, for *key*, if *name* cannot be one."""
    if not isinstance(name, str) or _is_method(name) is None:
        remedy = "use a letter, then up to 62 of letters, 0-9, _ and -"
        raise ConfigError(key, name, "no name of a method", remedy)
