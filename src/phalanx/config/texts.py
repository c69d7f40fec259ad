"""Rules about text: names, secrets, commands, hosts, paths, and lists and tables of text."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import ClassVar, cast
from urllib.parse import urlsplit

import msgspec

from phalanx.config.rules import Rule, alternatives, kind_of
from phalanx.config.secret import HIDDEN, Secret
from phalanx.errors import ConfigError
from phalanx.types import is_dns_label

_SIZE = re.compile(r"[1-9][0-9]{0,15}([KMGT](i?B)?)?")
_SYNC = re.compile(r"[1-9][0-9]{0,8}(ms|s|m|h)")
_NAME = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,252}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# systemd.unit(5): at most 255 of these, suffix included.
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,246}(\.service)?")
_OTHER_UNITS = (
    ".socket", ".device", ".mount", ".automount", ".swap", ".target", ".path", ".timer", ".slice", ".scope",
)  # fmt: skip
_LABEL_KEY = re.compile(r"[A-Za-z0-9][-_./A-Za-z0-9]{0,62}")


class Text(msgspec.Struct, frozen=True):
    """Printable text on one line. Empty only where that means "not set"."""

    words: str = "text"
    empty: bool = True
    spaces: bool = True

    @property
    def shape(self) -> str:
        return self.words

    def __call__(self, key: str, value: object) -> str:
        text = one_line(key, value, f"write {self.words}")
        if not text and not self.empty:
            raise ConfigError(key, value, "empty", f"write {self.words}")
        if not self.spaces and " " in text:
            raise ConfigError(key, value, "contains spaces", "leave them out")
        return text


class File(msgspec.Struct, frozen=True):
    """A path, as text or pathlib. Whether it exists is for whoever opens it.

    *of_database*: made absolute in Python too, not only in files; the environment may say from where.
    """

    of_database: bool = False

    @property
    def shape(self) -> str:
        return "path"

    def __call__(self, key: str, value: object) -> str:
        text = one_line(key, str(value) if isinstance(value, PurePath) else value, "write a path")
        if text.startswith("~"):
            raise ConfigError(key, value, "~ is not expanded", "write the whole path")
        return text


class Label(msgspec.Struct, frozen=True):
    """A DNS label."""

    what: str
    reserved: frozenset[str] = frozenset()

    @property
    def shape(self) -> str:
        return "DNS label: 1 to 63 of a-z, 0-9 and inner hyphens"

    def __call__(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not is_dns_label(value):
            problem = (
                f"not a name for {self.what}" if isinstance(value, str) else f"{kind_of(value)}, not text"
            )
            raise ConfigError(key, value, problem, "use 1 to 63 of a-z, 0-9 and inner hyphens")
        if value in self.reserved:
            raise ConfigError(key, value, "reserved by Phalanx", f"choose another name for {self.what}")
        return value


class Name(msgspec.Struct, frozen=True):
    """A short name for people. Empty: one is made."""

    @property
    def shape(self) -> str:
        return "1 to 63 letters, digits, `-`, `_`, `.`"

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and (not value or _NAME.fullmatch(value)):
            return value
        raise ConfigError(key, value, "not a name", "use 1 to 63 letters, digits, -, _ and .")


class UnitName(msgspec.Struct, frozen=True):
    """The full name of a systemd service; ``.service`` may be left out."""

    @property
    def shape(self) -> str:
        return "name of a service, or of an instance of a template"

    def __call__(self, key: str, value: object) -> str:
        text = one_line(key, value, "write the name of a service, such as wiki.service")
        if not _UNIT.fullmatch(text):
            raise ConfigError(key, value, "not a unit name", "write one such as wiki.service")
        if text.endswith(_OTHER_UNITS):
            raise ConfigError(key, value, "not a service", "name the service that it belongs to")
        name = text.removesuffix(".service")
        if name.endswith("@") or not name:
            problem = "a template, of which only instances can run" if name else "no name"
            raise ConfigError(key, value, problem, "name an instance, such as wiki@blue.service")
        return f"{name}.service"


class Signal(msgspec.Struct, frozen=True):
    """The name of a signal without SIG. Empty only where that means "not set"."""

    empty: bool = False
    names: ClassVar[tuple[str, ...]] = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL")

    @property
    def shape(self) -> str:
        return alternatives([f"`{name}`" for name in self.names])

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and (
            value.upper().removeprefix("SIG") in self.names or (self.empty and not value)
        ):
            return value.upper().removeprefix("SIG")
        raise ConfigError(key, value, "not a signal to stop with", f"choose {alternatives(self.names)}")


class Size(msgspec.Struct, frozen=True):
    """Bytes as nats-server writes them."""

    @property
    def shape(self) -> str:
        return "size, such as `512MB` or `10GB`"

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and (not value or (len(value) <= 20 and _SIZE.fullmatch(value))):
            return value
        raise ConfigError(key, value, "not a size", "write a number and a unit, such as 10GB")


class SyncInterval(msgspec.Struct, frozen=True):
    """``always``, or a duration in nats-server's own notation."""

    @property
    def shape(self) -> str:
        return "`always`, or a duration such as `500ms`, `10s`, `2m`"

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and (value == "always" or _SYNC.fullmatch(value)):
            return value
        raise ConfigError(key, value, "neither always nor a duration", "write always, 500ms, 10s or 2m")


class SecretRule(msgspec.Struct, frozen=True):
    """A secret. Its value is in no message."""

    @property
    def shape(self) -> str:
        return "secret"

    def __call__(self, key: str, value: object) -> Secret:
        secret = Secret(value) if isinstance(value, str) else value
        if not isinstance(secret, Secret):
            raise ConfigError(key, Secret("?"), f"{kind_of(value)}, not text", "write text, or a Secret")
        text = secret.reveal()
        if not text.isprintable():
            raise ConfigError(
                key, secret, "contains control characters", "remove them (a line end at the end?)"
            )
        if re.fullmatch(r"\$\{?[A-Za-z_][A-Za-z0-9_]*\}?", text):
            remedy = f"variables are not expanded here; use {key.rpartition('.')[2]}_env"
            raise ConfigError(key, secret, "looks like a variable, not a secret", remedy)
        return secret


class Command(msgspec.Struct, frozen=True):
    """A program and its arguments. Text is split as a POSIX shell would, but no shell runs it.

    *empty*: an empty list means "not set".
    """

    empty: bool = False

    @property
    def shape(self) -> str:
        return "text (split like a shell would, no shell runs it) or a list of arguments"

    def __call__(self, key: str, value: object) -> tuple[str, ...]:
        remedy = "write text or a list of arguments, such as 'python3 -m http.server 8080'"
        if isinstance(value, str):
            try:
                arguments = tuple(shlex.split(value))
            except ValueError as error:
                raise ConfigError(key, value, f"cannot be split: {error}", "close the quotes") from error
        else:
            arguments = strings(key, value, remedy)
            if not arguments and self.empty:
                return ()
        if not arguments or not arguments[0]:
            raise ConfigError(key, value, "names no program", remedy)
        if not all(is_passable(argument) for argument in arguments):
            raise ConfigError(key, value, "contains characters that no program can be given", "remove them")
        return arguments


class Strings(msgspec.Struct, frozen=True):
    """A list of texts, each under the same rule."""

    each: Rule

    @property
    def shape(self) -> str:
        return f"list; each: {self.each.shape}"

    def __call__(self, key: str, value: object) -> tuple[str, ...]:
        items = strings(key, value, "write a list of texts")
        return tuple(self.each(f"{key}[{n}]", item) for n, item in enumerate(items))


class Environment(msgspec.Struct, frozen=True):
    """Environment variables: name to text."""

    @property
    def shape(self) -> str:
        return "table of name = text"

    def __call__(self, key: str, value: object) -> dict[str, str]:
        pairs = string_map(key, value, "a table of name = text")
        for name, text in pairs.items():
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(
                    f"{key}.{name}", text, "not the name of a variable", "use letters, digits, _"
                )
            if not is_passable(text):
                problem = "contains characters that no program can be given"
                raise ConfigError(f"{key}.{name}", Secret("?"), problem, "remove them")
        return pairs


class Labels(msgspec.Struct, frozen=True):
    """Labels of a node: name to text."""

    @property
    def shape(self) -> str:
        return "table of name = text, at most 64; names: letters, digits, `-`, `_`, `.`, `/`"

    def __call__(self, key: str, value: object) -> dict[str, str]:
        pairs = string_map(key, value, "a table of name = text")
        if len(pairs) > 64:
            raise ConfigError(key, f"{len(pairs)} labels", "too many", "keep at most 64")
        for name, text in pairs.items():
            if not _LABEL_KEY.fullmatch(name):
                raise ConfigError(
                    f"{key}.{name}", text, "not a label's name", "use letters, digits, -, _, . and /"
                )
            if len(one_line(f"{key}.{name}", text, "write one line")) > 256:
                raise ConfigError(
                    f"{key}.{name}", f"{text[:20]}…", "too long", "write at most 256 characters"
                )
        return pairs


class Host(msgspec.Struct, frozen=True):
    """An IP address or a host name to listen on."""

    @property
    def shape(self) -> str:
        return "IP address or host name"

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and is_host(value):
            return value
        raise ConfigError(
            key, value, "not a host", "write an IP address (IPv6 without brackets) or a host name"
        )


class Address(msgspec.Struct, frozen=True):
    """``host:port``, IPv6 in brackets."""

    @property
    def shape(self) -> str:
        return "`host:port`"

    def __call__(self, key: str, value: object) -> str:
        if isinstance(value, str) and split_address(value) is not None:
            return value
        raise ConfigError(key, value, "not an address", "write host:port, IPv6 in brackets: [::1]:8080")


class DirectAddress(Address, frozen=True):
    """An address of this host that others reach, or none."""

    def __call__(self, key: str, value: object) -> str:
        if value == "":
            return ""
        text = super().__call__(key, value)
        if (split_address(text) or ("", 0))[0] in ("0.0.0.0", "::"):
            raise ConfigError(key, text, "no address that others can send to", "write one of this host's own")
        return text


class HttpUrl(msgspec.Struct, frozen=True):
    """An http or https URL. A password in it is in no message."""

    @property
    def shape(self) -> str:
        return "`http://` or `https://` URL"

    def __call__(self, key: str, value: object) -> str:
        remedy = "write a URL such as http://127.0.0.1:8080/health"
        text = one_line(key, value, remedy)
        try:
            parts = urlsplit(text)
            good = parts.scheme in ("http", "https") and is_host(parts.hostname or "") and parts.port != 0
        except ValueError:
            good = False
        if not good or " " in text:
            raise ConfigError(key, without_login(text), "not an http URL", remedy)
        return text


# --- helpers


def one_line(key: str, value: object, remedy: str) -> str:
    """*value* if it is printable text."""
    if not isinstance(value, str):
        raise ConfigError(key, value, f"{kind_of(value)}, not text", remedy)
    if not value.isprintable():
        raise ConfigError(key, value, "contains control characters", "remove them")
    return value


def strings(key: str, value: object, remedy: str) -> tuple[str, ...]:
    """*value* if it is a list or tuple of texts."""
    if not isinstance(value, list | tuple):
        raise ConfigError(key, value, f"{kind_of(value)}, not a list", remedy)
    items = tuple(cast("Sequence[object]", value))
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise ConfigError(f"{key}[{number}]", item, f"{kind_of(item)}, not text", remedy)
    return cast("tuple[str, ...]", items)


def string_map(key: str, value: object, words: str) -> dict[str, str]:
    """*value* if it maps texts to texts."""
    if not isinstance(value, Mapping):
        raise ConfigError(key, value, f"{kind_of(value)}, not a table", f"write {words}")
    pairs: dict[str, str] = {}
    for name, text in cast("Mapping[object, object]", value).items():
        if not isinstance(name, str):
            raise ConfigError(key, name, f"a name that is {kind_of(name)}", "write names as text")
        if not isinstance(text, str):
            raise ConfigError(f"{key}.{name}", text, f"{kind_of(text)}, not text", "put it in quotes")
        pairs[name] = text
    return pairs


def is_passable(text: str) -> bool:
    """Whether *text* can be an argument or an environment variable of a program."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_host(text: str) -> bool:
    """Whether *text* can name a host: an IP address or a host name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # What looks like a mistyped IPv4 address (all digits and dots) is no host name.
        return _HOST.fullmatch(text) is not None and not re.fullmatch(r"[0-9.]+", text) and ".." not in text
    return True


def split_address(text: str) -> tuple[str, int] | None:
    """``host:port`` taken apart, brackets removed; None if it is not one."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/@\[\]]+)):([0-9]{1,5})", text, re.ASCII)
    if match is None or not 1 <= int(match[3]) <= 65535 or not is_host(match[1] or match[2]):
        return None
    return match[1] or match[2], int(match[3])


def without_login(text: str) -> str:
    """A URL, or a list of them as text, with everything hidden that may be a user or a password."""
    if "@" not in text:
        return text
    scheme = re.match(r"(?:[a-z]+://)?", text)
    return f"{scheme[0] if scheme else ''}{HIDDEN}{text[text.rindex('@') :]}"
