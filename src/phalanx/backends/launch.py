"""What a process needs to be started, and whether this host has it: program, user, directory, limits."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
from collections.abc import Mapping

import msgspec

from phalanx import cgroup_v2, child
from phalanx.backends import limits
from phalanx.config import Process
from phalanx.errors import BackendError

# What is wrong with the program or its surroundings, not with this moment.
_PREPARE_ERRORS = {
    errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EPERM, errno.E2BIG, errno.ELOOP,
}  # fmt: skip


class Launch(msgspec.Struct, frozen=True):
    """A program that this host can start. ``contained``: in a control group of its own."""

    program: str
    env: Mapping[str, str]
    identity: child.Identity | None
    contained: bool


def prepare(config: Process, app: str) -> Launch:
    """Look whether it can be started at all; asks the file system. Raises BackendError (``prepare``)."""
    if config.cwd and not os.path.isdir(config.cwd):
        problem = "is no directory" if os.path.exists(config.cwd) else "does not exist"
        raise BackendError(app, "prepare", f"cwd {config.cwd} {problem}", "create it, or correct cwd")
    env = child.environment()
    identity = None
    if config.user:
        entry = _user(config.user, app)
        if entry.pw_uid != os.geteuid():
            identity = child.Identity(
                entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
            )
            env |= {"USER": entry.pw_name, "LOGNAME": entry.pw_name, "HOME": entry.pw_dir}
    env |= config.env
    program = _program(config, env, app)
    limits.check(config.limits, app)
    return Launch(program, env, identity, bool(cgroup_v2.base()))


def _user(name: str, app: str) -> pwd.struct_passwd:
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise BackendError(
            app, "prepare", f"there is no user {name!r} on this host", "create it, or correct user"
        ) from None
    if os.geteuid() not in (0, entry.pw_uid):
        raise BackendError(
            app,
            "prepare",
            f"only root can run a program as {name!r}",
            "run the node as root, or leave user out",
        )
    return entry


def _program(config: Process, env: Mapping[str, str], app: str) -> str:
    name = config.command[0]
    if "/" not in name:
        # As an exec would look it up: by the PATH that the program itself gets.
        if (found := shutil.which(name, path=env.get("PATH", os.defpath))) is None:
            raise BackendError(
                app,
                "prepare",
                f"no program {name!r} in PATH",
                "install it, or write its whole path in command",
            )
        return os.path.abspath(found)
    path = os.path.join(config.cwd or os.curdir, name)
    if not os.path.exists(path):
        raise BackendError(app, "prepare", f"program {path} does not exist", "install it, or correct command")
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise BackendError(
            app, "prepare", f"{path} is not executable", "chmod +x it, or name its interpreter in command"
        )
    return os.path.abspath(path)


def spawn_failed(app: str, command: str, error: OSError) -> BackendError:
    """What the kernel says against running *command*, in words."""
    step = "prepare" if error.errno in _PREPARE_ERRORS else "start"
    remedy = {
        errno.ENOENT: "look for a missing interpreter (first line of a script) or a directory that is gone",
        errno.EACCES: "give the user that runs it the right to execute it and to enter cwd",
        errno.ENOEXEC: "a script needs a first line such as #!/bin/sh",
        errno.EAGAIN: "raise the limit of processes (ulimit -u, TasksMax)",
        errno.ENOMEM: "free memory",
    }.get(error.errno or 0, "")
    return BackendError(app, step, f"cannot run {command}: {error.strerror or error}", remedy)
