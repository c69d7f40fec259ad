"""A container in which a real systemd is process 1 and this very Python runs, for tests and benchmarks.

::

    with DockerDaemon() as dockerd:
        host = SystemdHost(dockerd, "one", project)
        done = host.python("-m", "pytest", "tests/…")

The project, its virtual environment and its Python are mounted at their own places, read-only; whatever is
to be written goes to ``/tmp`` inside, or to a folder that is mounted with *options*.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from phalanx.testing.dockerd import DockerDaemon


class SystemdHost:
    """One such container: some 5 s until systemd runs. It ends with its dockerd."""

    def __init__(self, dockerd: DockerDaemon, name: str, project: Path, *options: str) -> None:
        self._dockerd, self.name, self._project = dockerd, name, project
        dockerd.run_systemd(name, *_mounts(project), *options)

    def python(
        self, *arguments: str, timeout: float, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run this Python in the project's folder inside, for *timeout* seconds at most."""
        environment = {
            "PYTHONPATH": f"{self._project}/src",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.environ["PATH"],
            **(env or {}),
        }
        return self._dockerd.try_docker(
            *("exec", f"--workdir={self._project}"),
            *(f"--env={name}={text}" for name, text in environment.items()),
            *(self.name, sys.executable, *arguments),
            timeout=timeout,
        )


def _mounts(project: Path) -> list[str]:
    """The project and all of its Python, each at its own place."""
    places = {project, Path(sys.prefix), Path(sys.prefix).resolve()}
    if sys.base_prefix == "/usr":
        # The distribution's own: its directories hold the image's programs as well.
        version = f"python3.{sys.version_info.minor}"
        places |= {Path("/usr/bin") / version, Path("/usr/lib") / version}
    else:
        places.add(Path(sys.base_prefix))
    inner = {one for one in places if any(other in one.parents for other in places)}
    return [f"--volume={place}:{place}:ro" for place in sorted(places - inner) if place.exists()]
