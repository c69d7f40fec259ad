"""``phalanx version`` and ``phalanx completion``."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from phalanx.bus.binary import nats_server_binary
from phalanx.cli import exits, output
from phalanx.errors import StartError
from phalanx.version import VERSION


def version(*, json: Annotated[bool, Parameter(help="As JSON.")] = False) -> int:
    """Show the versions of Phalanx, of its nats-server and of Python."""
    server = nats_server_version()
    if json:
        output.emit(
            {"phalanx": VERSION, "nats_server": server, "python": platform.python_version()}, pretty=True
        )
    else:
        output.say(
            f"phalanx {VERSION}, nats-server {server or 'not found'}, Python {platform.python_version()}"
        )
    return exits.OK


def nats_server_version() -> str:
    """The version of the nats-server that embedded servers would be; empty if there is none."""
    try:
        done = subprocess.run(
            [nats_server_binary(), "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (StartError, OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().rpartition("v")[2]


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="For which shell.")],
    /,
    *,
    json: Annotated[bool, Parameter(help="As JSON: the script is one field of it.")] = False,
) -> int:
    """Print a completion script; see docs/cli.md for where to put it."""
    from phalanx.cli.main import app, import_all

    import_all()
    script = app.generate_completion(shell=shell)
    if json:
        output.emit({"shell": shell, "script": script})
    else:
        sys.stdout.write(script)
    return exits.OK
