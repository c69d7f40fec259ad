"""Control groups of the kernel (cgroup v2): a set of processes that no child can leave, killed as one.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst of the kernel. Only the standard library is
imported, so that the keeper stays small. What is here blocks, for milliseconds as a rule.

A cgroup of ours is a directory ``phalanx-<name>`` below the *base*: the cgroup in which this process runs
itself, as a service manager made it, where we may write there. Whoever made one holds a lock on it
(flock(2)), which the kernel drops with the process: so what a dead one has left can be told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from phalanx import system

PREFIX = "phalanx-"
OWN = "phalanx-node"
"""Where the processes of a node itself go, if controllers need them out of the base."""

_ATTEMPTS = 5
_POLL_MS = 20
_DELEGATED = "user.delegate"
"""The extended attribute by which systemd marks a subtree as ours (systemd.resource-control(5))."""


class Cgroup:
    """One that this process holds until :meth:`remove`: *descriptor* is its directory's, and locked."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        """Whoever has a copy of it holds it with us. Raises ValueError once it was let go of."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is not held any more")
        return self._descriptor

    def limit(self, files: Mapping[str, str]) -> None:
        """Write its interface files, such as ``memory.max``. Raises OSError."""
        for name, text in files.items():
            _write(f"{self.path}/{name}", text)

    def add(self, pid: int) -> None:
        """Put a process into it, whose children are then born there. Raises OSError."""
        _write(f"{self.path}/cgroup.procs", str(pid))

    def remove(self) -> None:
        """Remove it, which only an empty one can be, and let go of it. Twice is harmless. Raises OSError."""
        if self._descriptor is None:
            return
        _remove(self.path)
        self.release()

    def release(self) -> None:
        """Let go of it as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


# --- where


@cache
def base() -> str:
    """The directory below which we may make cgroups, found out by making one; empty if there is none."""
    try:
        own = _own_directory()
        if own is None:
            return ""
        # Not the node's own leaf of what was delegated (DelegateSubgroup=, or what _enable has made).
        if _is_delegated(os.path.dirname(own)):
            own = os.path.dirname(own)
        probe = f"{own}/{PREFIX}probe-{os.urandom(8).hex()}"
        os.mkdir(probe, 0o755)
        try:
            usable = Path(probe, "cgroup.type").read_text().strip() == "domain"
            usable &= os.access(f"{own}/cgroup.procs", os.W_OK)
        finally:
            os.rmdir(probe)
    except OSError:
        return ""
    return own if usable else ""


def _is_delegated(path: str) -> bool:
    try:
        return sys.platform == "linux" and os.getxattr(path, _DELEGATED) == b"1"
    except OSError:
        return False


def _own_directory() -> str | None:
    """The directory of the cgroup v2 that this process is in, None if it can't be seen."""
    if not system.LINUX:
        return None
    entries = (line.partition("::") for line in Path("/proc/self/cgroup").read_text().splitlines())
    path = next((path for head, _, path in entries if head == "0"), None)
    if path is None or path.startswith("/.."):
        return None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # proc_pid_mountinfo(5): id, parent, device, root, mount point, … - type, source, options
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        if right.split()[0] == "cgroup2" and (root == "/" or path == root or path.startswith(f"{root}/")):
            inside = path if root == "/" else path[len(root) :]
            return os.path.normpath(f"{_unescape(point)}/{inside}")
    return None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def controllers() -> frozenset[str]:
    """The controllers that may limit what is in our cgroups: ``memory``, ``cpu``, … Raises OSError."""
    if not base():
        return frozenset()
    return frozenset(Path(base(), "cgroup.controllers").read_text().split())


def _enable(wanted: frozenset[str]) -> None:
    """Have *wanted* controllers in cgroups of ours. Raises OSError.

    A cgroup that hands controllers on may have no processes of its own ("no internal processes"). Where it
    was delegated to us they are the node's, and go to a cgroup beside the programs'; elsewhere they may be
    anybody's.
    """
    control = f"{base()}/cgroup.subtree_control"
    missing = wanted - set(Path(control).read_text().split())
    if not missing:
        return
    text = " ".join(f"+{name}" for name in sorted(missing))
    try:
        _write(control, text)
    except OSError as error:
        if error.errno != errno.EBUSY or not _is_delegated(base()):
            raise
        own = f"{base()}/{OWN}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(own, 0o755)
        for pid in Path(base(), "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                _write(f"{own}/cgroup.procs", pid)
        _write(control, text)


# --- making and removing


def path_of(name: str) -> str:
    """Where the cgroup *name* is, or would be. Only where there is a :func:`base`."""
    return f"{base()}/{PREFIX}{name}"


def create(name: str, limits: Mapping[str, str] | None = None) -> Cgroup:
    """Make the cgroup *name*, with its interface files set to *limits*. Raises OSError."""
    limits = limits or {}
    _enable(frozenset(file.partition(".")[0] for file in limits) & {"memory", "cpu", "pids"})
    path = path_of(name)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
        # Whoever removes left-overs may find it before we hold it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            made = _hold(path)
            try:
                made.limit(limits)
            except BaseException:
                with contextlib.suppress(OSError):
                    made.remove()
                made.release()
                raise
            return made
    raise BlockingIOError(errno.EAGAIN, "somebody else has it", path)


def _hold(path: str) -> Cgroup:
    """Lock it. Raises OSError, BlockingIOError if somebody else has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "it was removed", path)
    except BaseException:
        os.close(descriptor)
        raise
    return Cgroup(path, descriptor)


def left_over(prefix: str) -> Iterator[Cgroup]:
    """The cgroups whose name begins with *prefix*, and that nobody holds any more; the caller holds each."""
    if not base():
        return
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(base())):
            if name.startswith(PREFIX + prefix) and name != OWN:
                with contextlib.suppress(OSError):
                    yield _hold(f"{base()}/{name}")


def _remove(path: str) -> None:
    """Remove an empty cgroup, and those that its processes have made below. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        for folder, _, _ in os.walk(path, topdown=False):
            os.rmdir(folder)


# --- what is in it


def pids(path: str) -> list[int]:
    """The processes in it, and in those below; empty if it is not there. Raises OSError."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        for folder, _, _ in os.walk(path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found += map(int, Path(folder, "cgroup.procs").read_text().split())
    return found


def kill(path: str, deadline_seconds: float = 2.0) -> list[int]:
    """SIGKILL all in *path*, nobody can fork away; wait until they are gone; the pids of those who are not.

    One that is not there is empty. Raises OSError, and ValueError for one that is none of ours.
    """
    if not os.path.basename(path).startswith(PREFIX) or os.path.basename(path) == OWN:
        raise ValueError(f"refusing to kill what is in {path}")
    deadline = system.now() + deadline_seconds
    try:
        events = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events, 256, 0):
            if system.now() >= deadline:
                return pids(path)
            _kill_now(path)
            poll.poll(_POLL_MS)
    except OSError as error:
        if error.errno != errno.ENODEV:  # it was removed meanwhile
            raise
    finally:
        os.close(events)
    return []


def _kill_now(path: str) -> None:
    try:
        _write(f"{path}/cgroup.kill", "1")
    except FileNotFoundError:  # before Linux 5.14: one after the other, until there are no more
        for pid in pids(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def kill_and_remove(path: str, deadline_seconds: float = 2.0) -> list[int]:
    """:func:`kill`, then remove it, whoever holds it. Raises OSError."""
    remaining = kill(path, deadline_seconds)
    if not remaining:
        _remove(path)
    return remaining


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
