"""From what was declared (structs, keyword arguments, TOML tables) to checked declarations.

A :class:`Reader` collects every error instead of stopping at the first. A part that is wrong is read as
None; whoever made the reader looks at ``errors`` before it uses anything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar, cast, get_type_hints

import msgspec

from phalanx.config import apps, backends, checks, node
from phalanx.config.databases import SQLite
from phalanx.config.declaration import unknown_key
from phalanx.config.events import Events
from phalanx.config.nats_urls import LOGIN_FIELDS, parse_urls
from phalanx.config.patterns import Pool, Ring
from phalanx.config.relations import check_relations, relations
from phalanx.config.rules import About, Nested, kind_of
from phalanx.config.secret import Secret
from phalanx.config.texts import File, Label, SecretRule
from phalanx.config.vip import VirtualIP, vip_of
from phalanx.decide.backoff import Backoff
from phalanx.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

SECTIONS = ("nats", "labels", "timings", "fence", "http", "logging")
"""Fields of PlatformConfig that are sections of their own in TOML, and in the keys of errors."""

MAX_SECRET_BYTES = 64 * 1024

DATABASES = "PHALANX_DATABASES"
"""The environment variable that says where relative paths of databases count from."""


class Field(msgspec.Struct, frozen=True):
    """One field of a declaration."""

    about: About
    required: bool
    default: Any


@functools.cache
def fields_of(kind: type[msgspec.Struct]) -> dict[str, Field]:
    """The fields of a declaration, in the order in which they are declared."""
    hints = {} if kind is Backoff else get_type_hints(kind, include_extras=True)
    result: dict[str, Field] = {}
    for info in msgspec.structs.fields(kind):
        name = info.name
        about = apps.RETRY[name] if kind is Backoff else next(iter(hints[name].__metadata__))
        default = info.default if info.default is not msgspec.NODEFAULT else None
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        result[name] = Field(about, info.required, default)
    return result


def tag_of(kind: type[msgspec.Struct]) -> str:
    """What ``type`` says in TOML; empty for declarations that need none."""
    return str(kind.__struct_config__.tag or "")


class Reader:
    """*directory*: where the file lies that is read (relative paths count from there); None in Python.

    *environ* is for secrets from the environment (``password_env``), which only files may ask for.
    """

    def __init__(self, *, directory: Path | None = None, environ: Mapping[str, str] | None = None) -> None:
        self.errors: list[ConfigError] = []
        self._directory = directory
        self._environ = os.environ if environ is None else environ
        self._nested: dict[str, Callable[[object, str], object]] = {
            "pattern": self._pattern,
            "backend": lambda value, key: self._optional(value, key, backends.BACKENDS),
            "database": self._database,
            "events": self._events,
            "ready": lambda value, key: self._optional(value, key, checks.CHECKS),
            "vip": self._vips,
            "limits": lambda value, key: self.read(backends.Limits, value, key),
            "restart": lambda value, key: self.read(apps.Restart, value, key),
            "fence": self._fence,
            "checks": self._checks,
            "hook_timeouts": lambda value, key: self.read(apps.HookTimeouts, value, key),
            "retry": lambda value, key: self.read(Backoff, value, key),
            "nats": self.nats,
            "urls": lambda value, key: parse_urls(key, value).urls,
            "timings": lambda value, key: self.read(node.Timings, value, key),
            "http": lambda value, key: self.read(node.HttpServer, value, key),
            "logging": lambda value, key: self.read(node.Logging, value, key),
        }

    def read(self, kind: type[S], value: object, key: str) -> S | None:
        """*value* (a *kind* already, or a table) as a checked *kind*; None when something is wrong."""
        table = self._table(kind, value, key)
        return None if table is None else self._fields(kind, table, key)

    def app(self, name: object, table: Mapping[str, object]) -> apps.AppConfig | None:
        """One app. *table* holds its fields without the name."""
        key = f"apps.{name}" if isinstance(name, str) else "apps.?"
        try:
            cast("Label", fields_of(apps.AppConfig)["name"].about.rule)("apps", name)
        except ConfigError as error:
            self.errors.append(error)
            name = "unnamed"
        if "name" in table:
            self.errors.append(
                ConfigError(f"{key}.name", table["name"], "an app's name is its key", "leave it out")
            )
        return self._fields(apps.AppConfig, {**table, "name": name}, key)

    def nats(self, value: object, key: str) -> node.NatsOptions | node.EmbeddedNats | None:
        """``nats`` in all its forms: URLs, options, an embedded server."""
        if value == "embedded":
            return node.EmbeddedNats()
        if isinstance(value, node.EmbeddedNats):
            return self.read(node.EmbeddedNats, value, key)
        if isinstance(value, str | list | tuple):
            return self._options({"urls": cast("object", value)}, key, key)
        if isinstance(value, Mapping):
            table = dict(cast("Mapping[object, object]", value))
            embedded = table.pop("embedded", False)
            if isinstance(embedded, Mapping):
                for name in table:
                    self.errors.append(unknown_key(key, name, table[name], ("embedded",), secret=True))
                return self.read(node.EmbeddedNats, cast("object", embedded), f"{key}.embedded")
            if not isinstance(embedded, bool):
                problem = f"{kind_of(embedded)}, not a switch"
                self.errors.append(ConfigError(f"{key}.embedded", embedded, problem, "write true or false"))
                return None
            return self.read(node.EmbeddedNats, table, key) if embedded else self._options(table, key)
        if isinstance(value, node.NatsOptions):
            return self._options(value, key)
        remedy = 'write URLs, "embedded", NatsOptions(...) or EmbeddedNats(...)'
        self.errors.append(ConfigError(key, f"({type(value).__name__})", "not a way to reach NATS", remedy))
        return None

    def absolute(self, path: str) -> str:
        """*path* from the file's folder, or in Python from the working directory."""
        return str((self._directory or Path.cwd()) / path)

    # --- one declaration

    def _table(self, kind: type[msgspec.Struct], value: object, key: str) -> dict[str, object] | None:
        """The fields that *value* sets, secrets fetched."""
        if isinstance(value, kind):
            return {name: getattr(value, name) for name in value.__struct_fields__}
        if not isinstance(value, Mapping):
            remedy = f"write a table, or {kind.__name__}(...)"
            shown = f"({type(value).__name__})" if _holds_secrets(kind) else value
            self.errors.append(ConfigError(key, shown, f"{kind_of(value)}, not {kind.__name__}", remedy))
            return None
        table: dict[str, object] = {}
        for name, item in cast("Mapping[object, object]", value).items():
            if isinstance(name, str):
                table[name] = item
            else:
                self.errors.append(ConfigError(key, name, "a key that is not text", "write keys as text"))
        return table if self._directory is None else self._fetch_secrets(kind, table, key)

    def _fields(self, kind: type[S], table: Mapping[str, object], key: str) -> S | None:
        before = len(self.errors)
        known = fields_of(kind)
        for name in table:
            if name not in known:
                secret = _holds_secrets(kind)
                self.errors.append(unknown_key(key, name, table[name], known, secret=secret))
        values: dict[str, object] = {}
        for name, field in known.items():
            path = name if kind is node.PlatformConfig and name in SECTIONS else f"{key}.{name}"
            if name in table:
                try:
                    values[name] = self._value(name, field.about, table[name], path)
                except ConfigError as error:
                    self.errors.append(error)
            elif field.required:
                self.errors.append(ConfigError(path, None, "missing", f"set it: {field.about.rule.shape}"))
        if len(self.errors) > before:
            return None
        config = cast("Callable[..., S]", kind)(**values)
        self.errors += relations(config, key)
        return config if len(self.errors) == before else None

    def _value(self, name: str, about: About, value: object, key: str) -> object:
        if isinstance(about.rule, Nested):
            return self._nested[name](value, key)
        result = about.rule(key, value)
        if isinstance(about.rule, File) and result:
            if about.rule.of_database and (folder := self._environ.get(DATABASES)):
                return str(Path.cwd() / File()(DATABASES, folder) / result)
            if about.rule.of_database or self._directory is not None:
                return self.absolute(result)
        return result

    def unknown(self, key: str, table: Mapping[str, object], known: Iterable[str]) -> None:
        """Note every key of *table* that is not *known*."""
        known = tuple(known)
        self.errors += [
            unknown_key(key, name, table[name], known, secret=True) for name in table if name not in known
        ]

    # --- declarations inside declarations

    def _tagged(self, value: object, key: str, kinds: Iterable[type[msgspec.Struct]]) -> Any:
        """A declaration that says by ``type`` which one it is."""
        for kind in kinds:
            if isinstance(value, kind):
                return self.read(kind, value, key)
        tags = {tag_of(kind): kind for kind in kinds}
        names = " or ".join(f"{kind.__name__}(...)" for kind in kinds)
        if not isinstance(value, Mapping):
            raise ConfigError(
                key, value, f"{kind_of(value)}, not a declaration", f"write {names}, or a table"
            )
        table = dict(cast("Mapping[object, object]", value))
        tag = table.pop("type", None)
        if not isinstance(tag, str) or tag not in tags:
            problem = "missing" if tag is None else "unknown type"
            raise ConfigError(f"{key}.type", tag, problem, f"choose from {', '.join(tags)}")
        if self._directory is not None and any(f.about.python_only for f in fields_of(tags[tag]).values()):
            raise ConfigError(f"{key}.type", tag, "cannot be written in TOML", "declare this app in Python")
        return self.read(tags[tag], table, key)

    def _optional(self, value: object, key: str, kinds: Iterable[type[msgspec.Struct]]) -> Any:
        return None if value is None else self._tagged(value, key, kinds)

    def _pattern(self, value: object, key: str) -> Any:
        kinds = (apps.ActivePassive, Pool, Ring)
        if isinstance(value, str):
            value = {"type": value}
        elif isinstance(value, type) and value in kinds:
            raise ConfigError(key, value.__name__, "a class, not a pattern", f"write {value.__name__}()")
        return self._tagged(value, key, kinds)

    def _database(self, value: object, key: str) -> Any:
        """Text is a path; a table needs no ``type`` as long as there is one kind of database."""
        if value is None:
            return None
        if isinstance(value, str | PurePath):
            value = {"type": tag_of(SQLite), "path": value}
        elif isinstance(value, Mapping):
            value = {"type": tag_of(SQLite), **cast("Mapping[object, object]", value)}
        return self._tagged(value, key, (SQLite,))

    def _events(self, value: object, key: str) -> Events | None:
        """``true`` is a table without anything in it."""
        if value is None or value is False:
            return None
        return self.read(Events, {} if value is True else value, key)

    def _fence(self, value: object, key: str) -> node.Fence | None:
        """Text, or a list of texts, is a command."""
        if value is None:
            return None
        if isinstance(value, str | list | tuple):
            value = {"command": cast("object", value)}
        return self.read(node.Fence, value, key)

    def _vips(self, value: object, key: str) -> tuple[VirtualIP, ...]:
        """One address, or a list of them."""
        if value is None:
            return ()
        several = isinstance(value, list | tuple)
        items = list(cast("Iterable[object]", value)) if several else [value]
        found: list[VirtualIP] = []
        for number, item in enumerate(items):
            try:
                place = f"{key}[{number}]" if several else key
                found.append(self._tagged(vip_of(item), place, (VirtualIP,)))
            except ConfigError as error:
                self.errors.append(error)
        return tuple(found)

    def _checks(self, value: object, key: str) -> tuple[checks.Check, ...]:
        if not isinstance(value, list | tuple):
            raise ConfigError(key, value, f"{kind_of(value)}, not a list", "write a list of checks")
        found: list[checks.Check] = []
        before = len(self.errors)
        for number, item in enumerate(cast("Iterable[object]", value)):
            try:
                found.append(self._tagged(item, f"{key}[{number}]", checks.CHECKS))
            except ConfigError as error:
                self.errors.append(error)
        if len(self.errors) == before:
            found = _named(found)
            self.errors += check_relations(found, key)
        return tuple(found)

    def _options(self, value: object, key: str, urls_key: str = "") -> node.NatsOptions | None:
        """NatsOptions, with the login that is in the URLs, if any, in its own fields."""
        table = self._table(node.NatsOptions, value, key)
        if table is None:
            return None
        if "urls" in table:
            try:
                servers = parse_urls(urls_key or f"{key}.urls", table.pop("urls"))
            except ConfigError as error:
                self.errors.append(error)
                self._fields(node.NatsOptions, table, key)
                return None
            table["urls"] = servers.urls
            for name, found in servers.login.items():
                if _revealed(table.get(name)) not in (None, "", _revealed(found)):
                    problem = f"the URLs have another {name}"
                    self.errors.append(ConfigError(f"{key}.{name}", Secret("?"), problem, "keep one of them"))
                table[name] = found
            if servers.login:
                for name in LOGIN_FIELDS:
                    table.setdefault(name, "")
        return self._fields(node.NatsOptions, table, key)

    # --- secrets of files

    def _fetch_secrets(
        self, kind: type[msgspec.Struct], table: dict[str, object], key: str
    ) -> dict[str, object]:
        """Replace ``x_file`` and ``x_env`` by x, for every secret x, unless such a field is declared."""
        known = fields_of(kind)
        for name in [name for name, field in known.items() if isinstance(field.about.rule, SecretRule)]:
            for suffix, fetch in (("_file", self._secret_file), ("_env", self._secret_variable)):
                source = f"{name}{suffix}"
                if source in known or source not in table:
                    continue
                place = table.pop(source)
                try:
                    if name in table:
                        problem = f"{name} is set too"
                        raise ConfigError(f"{key}.{source}", place, problem, "keep one of them")
                    table[name] = fetch(f"{key}.{source}", place)
                except ConfigError as error:
                    self.errors.append(error)
        return table

    def _secret_file(self, key: str, value: object) -> Secret:
        path = (self._directory or Path()) / File()(key, value)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SECRET_BYTES + 1)
            text = data.decode().rstrip("\r\n")
        except OSError as error:
            raise ConfigError(
                key, value, f"cannot be read: {error.strerror}", "name a readable file"
            ) from error
        except UnicodeDecodeError:
            raise ConfigError(key, value, "is not UTF-8 text", "name a text file") from None
        if not text or len(data) > MAX_SECRET_BYTES:
            raise ConfigError(key, value, "is too large" if text else "is empty", "put one secret in it")
        return Secret(text)

    def _secret_variable(self, key: str, value: object) -> Secret:
        if not isinstance(value, str) or not value:
            raise ConfigError(key, value, "not the name of a variable", "name an environment variable")
        text = self._environ.get(value, "")
        if not text:
            raise ConfigError(key, value, "this environment variable is not set", "set it to the secret")
        return Secret(text)


def _revealed(value: object) -> object:
    return value.reveal() if isinstance(value, Secret) else value


def _holds_secrets(kind: type[msgspec.Struct]) -> bool:
    return any(isinstance(field.about.rule, SecretRule) for field in fields_of(kind).values())


def _named(found: list[checks.Check]) -> list[checks.Check]:
    """Every check with a name: its kind, numbered where that is taken."""
    taken = {check.name for check in found}
    named: list[checks.Check] = []
    for check in found:
        name, number = check.name or tag_of(type(check)), 2
        if not check.name:
            while name in taken:
                name, number = f"{tag_of(type(check))}-{number}", number + 1
            taken.add(name)
        named.append(msgspec.structs.replace(check, name=name))
    return named
