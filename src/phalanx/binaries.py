"""Where the programs are that come with Phalanx as wheels."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from phalanx.errors import StartError


def find_program(name: str, wheel: str) -> str:
    """The absolute path of the program *name*: beside this Python (from *wheel*), or on PATH.

    The wheel comes first: its version is the one Phalanx was tested with.
    Raises StartError when there is none.
    """
    for folder in (Path(sys.executable).parent, Path(sys.prefix) / "bin", *_wheel_folders(name, wheel)):
        if found := shutil.which(name, path=str(folder)):
            return os.path.abspath(found)
    if found := shutil.which(name):
        return os.path.abspath(found)
    raise StartError(f"no {name} program was found beside Python or on PATH", f"pip install {wheel}")


def _wheel_folders(name: str, wheel: str) -> list[Path]:
    """Where pip put the wheel's script, also for ``--user`` and ``--target`` installations."""
    from importlib import metadata

    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).parent for file in files if file.name == name]
