"""What must fit together in the declaration of a database, and between those of several apps.

Paths are compared as the file system has them, symbolic links followed; nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from phalanx.config.apps import AppConfig
from phalanx.config.databases import SQLite, folder_of
from phalanx.errors import ConfigError

MAX_NAME_BYTES = 200
"""Of a file name: `.<name>-phalanx` and `<name>.diverged-<epoch>.json` must be names too, of 255 at most."""

MAX_PATH_BYTES = 440
"""SQLite takes paths of up to 512 bytes (MAX_PATHNAME in os.h); the replica's is longer than the database's
by its folder's name, for which *MAX_NAME_BYTES* is allowed beside this."""

SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database."""


def database_relations(config: SQLite, key: str) -> Iterator[ConfigError]:
    """What does not fit together in one database."""
    name = os.path.basename(config.path)
    remedy = "choose a shorter one"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        problem = f"a file name of more than {MAX_NAME_BYTES} bytes"
        yield ConfigError(f"{key}.path", config.path, problem, remedy)
    elif len(os.fsencode(config.folder)) > MAX_PATH_BYTES:
        yield ConfigError(f"{key}.path", config.path, f"longer than {MAX_PATH_BYTES} bytes", remedy)
    if not config.copy_to:
        return
    file, copy = _real(config.path), _real(config.copy_to)
    problem = ""
    if copy == file:
        problem = "the database itself"
    elif copy == file.parent:
        problem = "the database's own folder"
    elif copy.is_relative_to(folder_of(str(file))):
        problem = "inside the folder that Phalanx keeps beside the database"
    if problem:
        yield ConfigError(
            f"{key}.copy_to", config.copy_to, problem, "choose another folder, best on another disk"
        )


def between_databases(apps: Sequence[AppConfig]) -> Iterator[ConfigError]:
    """What does not fit together between the databases of *apps*: a file belongs to one app."""
    declared = [(app.name, app.database) for app in apps if app.database is not None]
    for number, (name, database) in enumerate(declared):
        for other_name, other in declared[:number]:
            yield from _between(f"apps.{name}.database", database, other_name, other)


def _between(key: str, one: SQLite, other_name: str, other: SQLite) -> Iterator[ConfigError]:
    mine, theirs = _real(one.path), _real(other.path)
    their_folder, my_folder = folder_of(str(theirs)), folder_of(str(mine))
    problem = ""
    if mine == theirs or _is_one_file(mine, theirs):
        problem = f"app {other_name!r} has the same file"
    elif mine in _side_files(theirs) or theirs in _side_files(mine):
        problem = f"SQLite needs that name for the database of app {other_name!r}, or the other way round"
    elif mine.is_relative_to(their_folder) or theirs.is_relative_to(my_folder):
        problem = f"Phalanx keeps {their_folder} for app {other_name!r}, or the other way round"
    if problem:
        yield ConfigError(f"{key}.path", one.path, problem, "give each app a file of its own")
    if not one.copy_to:
        return
    copy = _real(one.copy_to)
    problem = ""
    if other.copy_to and copy == _real(other.copy_to):
        problem = f"app {other_name!r} has the same"
    elif copy.is_relative_to(their_folder):
        problem = f"Phalanx keeps {their_folder} for app {other_name!r}"
    if problem:
        yield ConfigError(f"{key}.copy_to", one.copy_to, problem, "give each app a folder of its own")


def _real(path: str) -> Path:
    return Path(os.path.realpath(path))


def _side_files(file: Path) -> set[Path]:
    return {file.with_name(file.name + suffix) for suffix in SIDE_FILES}


def _is_one_file(one: Path, other: Path) -> bool:
    """Whether both names are hard links of one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # one does not exist (yet)
