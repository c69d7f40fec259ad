"""``phalanx.toml``: the same declarations as in Python, one section each.

Nothing in a file is expanded or interpolated: secrets come from ``password_file`` or ``password_env``.
Relative paths count from the file's folder.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from phalanx.config.app_relations import between_apps, with_platform
from phalanx.config.apps import AppConfig
from phalanx.config.build import read_platform
from phalanx.config.node import PlatformConfig
from phalanx.config.reader import SECTIONS, Reader
from phalanx.config.rules import kind_of
from phalanx.errors import ConfigError, ConfigFileError

MAX_BYTES = 1024 * 1024
PLATFORM_KEYS = ("name", "node", "data_dir")


def load_toml(
    path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None
) -> tuple[PlatformConfig, list[AppConfig]]:
    """What the file declares. Raises ConfigError for the first thing that is wrong.

    A file that cannot be read or is no TOML: ConfigFileError, with line and column.
    """
    platform, apps, errors = _read(Path(path), os.environ if environ is None else environ)
    if errors or platform is None:
        raise errors[0]
    return platform, apps


def check_toml(
    path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None
) -> list[ConfigError]:
    """Everything that is wrong with the file, as far as it can be told at once; empty if it is right."""
    return _read(Path(path), os.environ if environ is None else environ)[2]


def _read(
    path: Path, environ: Mapping[str, str]
) -> tuple[PlatformConfig | None, list[AppConfig], list[ConfigError]]:
    try:
        document = _parse(path)
    except ConfigError as error:
        return None, [], [error]
    reader = Reader(directory=path.absolute().parent, environ=environ)
    reader.unknown("", document, ("platform", *SECTIONS, "apps"))
    fields = _section(reader, document, "platform")
    reader.unknown("platform", fields, PLATFORM_KEYS)
    fields = {key: value for key, value in fields.items() if key in PLATFORM_KEYS}
    fields |= {key: document[key] for key in SECTIONS if key in document}
    platform = read_platform(reader, fields, environ)
    apps: list[AppConfig] = []
    for name, table in _section(reader, document, "apps").items():
        if not isinstance(table, dict):
            problem = f"{kind_of(table)}, not a table"
            reader.errors.append(
                ConfigError(f"apps.{name}", table, problem, f"write a section [apps.{name}]")
            )
        elif (app := reader.app(name, cast("dict[str, object]", table))) is not None:
            apps.append(app)
    reader.errors += between_apps(apps)
    if platform is not None:
        reader.errors += [error for app in apps for error in with_platform(platform, app)]
    return platform, apps, reader.errors


def _section(reader: Reader, document: Mapping[str, object], name: str) -> dict[str, object]:
    value = document.get(name, {})
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    reader.errors.append(
        ConfigError(name, value, f"{kind_of(value)}, not a table", f"write a section [{name}]")
    )
    return {}


def _parse(path: Path) -> dict[str, object]:
    """The file as tables. No message holds a line of it: there may be a secret in it."""
    shown = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigFileError(shown, 0, 0, problem, "name a readable TOML file") from error
    if len(data) > MAX_BYTES:
        raise ConfigFileError(shown, 0, 0, "larger than 1 MiB", "name a phalanx.toml")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigFileError(shown, line, column, "not UTF-8", "save it as UTF-8") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigFileError(shown, 0, 0, "nested too deeply", "write fewer brackets") from None
    except ValueError as error:  # TOMLDecodeError; and plain ones, for numbers and dates that cannot be
        raise _syntax_error(shown, text, str(error)) from None


def _syntax_error(path: str, text: str, message: str) -> ConfigFileError:
    """*message* as tomllib words it: ``problem (at line 3, column 5)``, or ``(at end of document)``."""
    problem = message.partition(" (at ")[0]
    match = re.search(r"\(at line ([0-9]+), column ([0-9]+)\)$", message)
    line, column = (int(match[1]), int(match[2])) if match else (0, 0)
    if message.endswith("(at end of document)"):
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return ConfigFileError(path, line, column, problem, "correct the TOML there")
