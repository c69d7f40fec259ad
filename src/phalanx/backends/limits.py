"""Limits of a process: whether this host can enforce them, and how they are set.

Those of the whole program are files of its control group (Documentation/admin-guide/cgroup-v2.rst); those
of each process are set on the gate, from which the program and all its children inherit them.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator

from phalanx import cgroup_v2
from phalanx.config import Limits
from phalanx.errors import BackendError

CPU_PERIOD_MICROSECONDS = 100_000
"""In each of them the program has its share; the kernel's default."""

_CONTROLLERS = {"memory": "memory", "cpus": "cpu", "processes": "pids"}
"""Which controller a limit needs."""


def of_cgroup(limits: Limits) -> dict[str, str]:
    """The interface files of the control group, and what goes into them."""
    files: dict[str, str] = {}
    if limits.memory is not None:
        # All of it is killed: half a program is worse than none.
        files |= {"memory.max": str(limits.memory), "memory.oom.group": "1"}
    if limits.cpus is not None:
        files["cpu.max"] = (
            f"{max(1000, int(limits.cpus * CPU_PERIOD_MICROSECONDS))} {CPU_PERIOD_MICROSECONDS}"
        )
    if limits.processes is not None:
        files["pids.max"] = str(limits.processes)
    return files


def check(limits: Limits, app: str) -> None:
    """Raise BackendError (``prepare``) for the first limit that could not be enforced here."""
    for name, problem, remedy in _problems(limits):
        raise BackendError(
            app,
            "prepare",
            f"limits.{name} = {getattr(limits, name)} cannot be enforced here: {problem}",
            remedy,
        )


def _problems(limits: Limits) -> Iterator[tuple[str, str, str]]:
    wanted = {name: kind for name, kind in _CONTROLLERS.items() if getattr(limits, name) is not None}
    if wanted:
        present = cgroup_v2.controllers()
        where = cgroup_v2.base()
        for name, controller in wanted.items():
            if not where:
                problem = "the node may not make control groups (cgroup v2)"
                yield name, problem, "run the node as a service with Delegate=yes, or leave the limit out"
            elif controller not in present:
                problem = f"there is no controller {controller} in {where}"
                remedy = (
                    "boot with cgroup v2 alone and put Delegate=yes into the node's service, or leave the "
                )
                yield name, problem, remedy + "limit out"
    for name, kind in _rlimits(limits).items():
        if sys.platform != "linux":
            yield name, "this is not Linux", "leave the limit out"
        _, hard = resource.getrlimit(kind)
        if os.geteuid() != 0 and hard != resource.RLIM_INFINITY and getattr(limits, name) > hard:
            yield name, f"the node itself may have {hard} at most", "lower it, or raise the node's own limit"
    if limits.nice is not None and os.geteuid() != 0:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        if limits.nice < own:
            yield "nice", f"only root can go below the node's own {own}", "raise it, or run the node as root"


def _rlimits(limits: Limits) -> dict[str, int]:
    kinds = {"open_files": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE}
    return {name: kind for name, kind in kinds.items() if getattr(limits, name) is not None}


def apply(limits: Limits, pid: int) -> None:
    """Set the limits of each process on *pid*, which hands them on to what it becomes. Raises OSError."""
    for name, kind in _rlimits(limits).items():
        value = getattr(limits, name)
        if sys.platform == "linux":
            resource.prlimit(pid, kind, (value, value))
    if limits.nice is not None:
        os.setpriority(os.PRIO_PROCESS, pid, limits.nice)
