"""The container backend under test, against a real dockerd."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from phalanx import config
from phalanx.testing.dockerd import EMPTY_IMAGE
from phalanx.testing.fake_backend import Behaviour

from .stages import PROGRAM, HostStage

SOCKET = "PHALANX_TEST_DOCKER_SOCKET"
"""Tells the nodes of the suite where its dockerd is."""


class DockerStage(HostStage):
    """``phalanx.Docker``, with this host's Python in containers that have nothing of their own."""

    name = "docker"
    kind = "container"

    def declare(self, behaviour: Behaviour, **options: object) -> config.Docker:
        """See ``RealStage.declare``."""
        python = os.path.realpath(sys.executable)
        folders = {"/usr", "/bin", "/lib", "/lib64", sys.base_prefix, str(PROGRAM.parent)}
        return config.Docker(
            image="phalanx-test/missing" if behaviour.missing else EMPTY_IMAGE,
            command=[python, *self.command(behaviour)[1:]],
            volumes=[
                *(f"{path}:{path}:ro" for path in sorted(folders) if os.path.isdir(path)),
                f"{self.folder}:{self.folder}",
            ],
            socket=os.environ[SOCKET],
            **options,  # pyright: ignore
        )

    def crash(self) -> None:
        """See ``Stage.crash``: by the number that the program has on this host."""
        own = (self.folder / "program.pid").read_text()
        for what in self.left():
            pid = int(what.split()[1])
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a process of a moment
                if re.search(rf"^NSpid:.*\s{own}$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                    os.kill(pid, 9)
