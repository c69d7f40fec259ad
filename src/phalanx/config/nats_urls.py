"""NATS URLs, taken apart: servers without logins, and the one login that was in them.

As NATS has it, ``nats://user:password@host`` is a user and ``nats://token@host`` a token.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from phalanx.config.secret import HIDDEN, Secret
from phalanx.config.texts import is_host, strings, without_login
from phalanx.errors import ConfigError

DEFAULT_PORT = 4222
_REMEDY = "write nats://host:4222 or tls://host:4222, several separated by commas"


class Servers(msgspec.Struct, frozen=True):
    """What a list of URLs says. The urls hold no login any more."""

    urls: tuple[str, ...]
    user: str = ""
    password: Secret = Secret()
    token: Secret = Secret()

    @property
    def login(self) -> dict[str, str | Secret]:
        """The fields of NatsOptions that the URLs set."""
        return {field: value for field in LOGIN_FIELDS if (value := getattr(self, field))}


LOGIN_FIELDS = ("user", "password", "token")


def parse_urls(key: str, value: object) -> Servers:
    """Servers from a comma separated text or a list. Raises ConfigError, which shows no login."""
    if isinstance(value, str):
        shown, items = without_login(value), [item.strip() for item in value.split(",")]
    else:
        items = list(_texts(key, value))
        shown = without_login(",".join(items))
    items = [item for item in items if item]
    if not items:
        raise ConfigError(key, shown, "names no server", _REMEDY)
    urls: list[str] = []
    logins: set[tuple[str, str | None]] = set()
    for item in items:
        parts = _split(key, item, shown)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        urls.append(f"{parts.scheme}://{host}:{parts.port or DEFAULT_PORT}")
        if parts.username is not None:
            password = None if parts.password is None else unquote(parts.password)
            logins.add((unquote(parts.username), password))
    if len(logins) > 1:
        raise ConfigError(key, shown, "the URLs have different logins", "use one for all servers")
    return _with_login(tuple(dict.fromkeys(urls)), *(logins or {("", None)}))


def _texts(key: str, value: object) -> tuple[str, ...]:
    """The list's items. What is no list of texts is not shown: it may hold a password."""
    try:
        return strings(key, value, _REMEDY)
    except ConfigError as error:
        raise ConfigError(error.key, f"({type(error.value).__name__})", error.problem, _REMEDY) from None


def _with_login(urls: tuple[str, ...], login: tuple[str, str | None]) -> Servers:
    user, password = login
    if password is None:
        return Servers(urls, token=Secret(user))
    return Servers(urls, user=user, password=Secret(password))


def _split(key: str, item: str, shown: str) -> SplitResult:
    if "@" not in shown:
        # Half a login looks like a port that is no number: don't show that either.
        shown = re.sub(r":(?!//)[^,\[\]/]*[^0-9,\[\]/:][^,]*", f":{HIDDEN}", shown)
    try:
        parts = urlsplit(item if "://" in item else f"nats://{item}")
        _ = parts.port
    except ValueError:
        raise ConfigError(
            key, shown, "not a URL", f"{_REMEDY}; encode :/@#,% in passwords as %3A …"
        ) from None
    if parts.scheme not in ("nats", "tls"):
        raise ConfigError(key, shown, f"scheme {parts.scheme!r}", _REMEDY)
    if not is_host(parts.hostname or "") or parts.port == 0:
        raise ConfigError(key, shown, "a URL without a proper host and port", _REMEDY)
    if parts.path not in ("", "/") or parts.query or parts.fragment or not item.isprintable() or " " in item:
        raise ConfigError(key, shown, "a URL with more than a login, a host and a port", _REMEDY)
    if parts.username == "" or (parts.username and parts.password == ""):
        raise ConfigError(key, shown, "a URL with half a login", "write user:password@ or token@")
    return parts
