"""Control groups: who is in one, and killing all of them.

A path here is as systemd says it (``/system.slice/wiki.service``): the same below each hierarchy that the
host has mounted. Those that systemd may use for its processes are asked (cgroups(7), systemd's
CGROUP_DELEGATION.md): the unified one, also where it stands beside the others (hybrid), and systemd's own
named one of the first version. Only the standard library is needed, as in :mod:`phalanx.system`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_HIERARCHIES = (_ROOT, _ROOT / "unified", _ROOT / "systemd")


def processes(path: str) -> set[int]:
    """The processes in the group *path* and in all groups below it; none if there is no such group.

    Raises OSError, ValueError for no path of a group below the root.
    """
    return {pid for folder in _folders(path) for pid in _members(folder)}


def kill(path: str) -> set[int]:
    """SIGKILL all processes of the group and those below; whom. One that forks meanwhile needs another call.

    Raises OSError, ValueError as :func:`processes`, and PermissionError.
    """
    found = processes(path)
    if os.getpid() in found:
        raise ValueError(f"this very process is in {path}")
    for folder in _folders(path):
        # All at once, forks included (Linux 5.14, unified hierarchy).
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder / "cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def memory_bytes(path: str) -> int | None:
    """The memory that the group uses; None where the kernel does not count it."""
    for file in (_ROOT / path[1:] / "memory.current", _ROOT / "memory" / path[1:] / "memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text())
    return None


def _folders(path: str) -> list[Path]:
    if not path.startswith("/") or not path.strip("/") or ".." in path.split("/"):
        raise ValueError(f"no control group below the root: {path!r}")
    return [folder for root in _HIERARCHIES if (folder := root / path.strip("/")).is_dir()]


def _members(folder: Path) -> Iterator[int]:
    for inner, _, _ in os.walk(folder):
        try:
            text = (Path(inner) / "cgroup.procs").read_text()
        except OSError as error:
            # It may go while we look, and says ENODEV while it goes.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            continue
        yield from map(int, text.split())
