"""systemd units that Phalanx runs: when each may run at all, and how it is killed for certain.

The invariant: a guarded unit can be started only while its permit is there, whoever asks. The guard is a
drop-in, the same for every unit, with an assertion on the permit's existence; it also takes away the
unit's own restarts, which would go on behind the back of whoever killed it. So "the permit is removed, then
the control group was seen to be empty" means that it does not run, and will not: not even by a start that
a dead node has sent and systemd has not read yet.

The permit is also the unit's environment file (``PHALANX_EPOCH`` …): it is new for each start, and needs no
reload of systemd.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from phalanx import cgroup, system

PERMITS = Path("/run/phalanx/units")
DROP_INS = Path("/run/systemd/system")
GUARD_NAME = "zz-phalanx.conf"
"""Drop-ins apply in the order of their names: after what an operator may have written."""

GUARD = f"""\
# By Phalanx: this unit runs while its app is active on this host, and only then (docs/backends.md).
[Unit]
AssertPathExists={PERMITS}/%n
[Service]
EnvironmentFile=-{PERMITS}/%n
Restart=no
RestartForceExitStatus=
"""

_LOOK_SECONDS = 0.01
_QUIET_SECONDS = 0.3
"""Without systemd's word a group that is empty may be just between two programs of its unit."""
_HOLDER = "# node "
_INVOCATION = "# invocation "


# --- may it run?


def guard_path(unit: str) -> Path:
    """Where the guard of *unit* is."""
    return DROP_INS / f"{unit}.d" / GUARD_NAME


def write_guard(unit: str) -> None:
    """Write it, whole or not at all; systemd has to be reloaded then. Raises OSError."""
    _write(guard_path(unit), GUARD)


class Permit(NamedTuple):
    """Who runs a unit. ``node``: the process of the node; ``invocation``: systemd's id of that start, empty
    while it is starting."""

    app: str
    node: system.ProcessRef
    invocation: str

    @property
    def is_held(self) -> bool:
        """Whether the node that wrote it still lives."""
        return self.node.alive()


def permit_path(unit: str) -> Path:
    """Where the permit of *unit* is."""
    return PERMITS / unit


def permit(unit: str, env: Mapping[str, str], invocation: str = "") -> None:
    """Let *unit* be started by us, with *env* (one has PHALANX_APP). Raises OSError."""
    node = system.ProcessRef.of(os.getpid())
    lines = [
        "# By Phalanx: while this file is here its unit may be started (docs/backends.md).",
        f"{_HOLDER}{node.pid} {node.start_time}",
        f"{_INVOCATION}{invocation}",
        *(f"{name}={_quoted(value)}" for name, value in env.items()),
    ]
    _write(permit_path(unit), "\n".join(lines) + "\n")


def read_permit(unit: str) -> Permit | None:
    """Who runs *unit*; None if nobody may. One that can't be understood is of a node that is gone."""
    try:
        lines = permit_path(unit).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    app, invocation, pid, started = "", "", 0, 0
    for line in lines:
        if line.startswith(_HOLDER):
            with contextlib.suppress(ValueError):
                pid, started = map(int, line.removeprefix(_HOLDER).split())
        elif line.startswith(_INVOCATION):
            invocation = line.removeprefix(_INVOCATION)
        elif line.startswith("PHALANX_APP="):
            app = line.partition("=")[2].strip('"')
    return Permit(app, system.ProcessRef(pid, started), invocation)


def take_permit_back(unit: str) -> None:
    """From now on nobody can start *unit*. Raises OSError other than that there is none."""
    permit_path(unit).unlink(missing_ok=True)


def _quoted(value: str) -> str:
    # systemd.exec(5), EnvironmentFile=: as in a shell's double quotes.
    for special in '\\"`$':
        value = value.replace(special, f"\\{special}")
    return f'"{value}"'


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


# --- the end


class Killed(NamedTuple):
    """What a kill came to. ``remaining``: who does not die; ``problem``: why systemd did not confirm it."""

    is_gone: bool
    killed: tuple[int, ...]
    remaining: tuple[int, ...]
    problem: str


def kill(unit: str, group: str, deadline_seconds: float) -> Killed:
    """Kill all of *unit*, whose control group is *group*, and see that it does not come back. Blocks.

    First the permit is taken back. Then everything in the group is killed, again and again while systemd
    ends the unit: its ExecStopPost= would be new processes. systemd is told by systemctl, which as root
    needs no D-Bus daemon; if it does not answer, a group that stays empty is the proof.

    Raises OSError (the permit or the group cannot be dealt with), ValueError.
    """
    take_permit_back(unit)
    began = quiet_since = system.now()
    killed, left = cgroup.kill(group), set[int]()
    stop = _Stop(unit)
    try:
        while (now := system.now()) < began + deadline_seconds:
            if left := cgroup.kill(group):
                killed, quiet_since = killed | left, now
            elif stop.is_over() and (not stop.problem or now - quiet_since > _QUIET_SECONDS):
                return Killed(True, tuple(killed), (), stop.problem)
            time.sleep(_LOOK_SECONDS)
    finally:
        stop.give_up()
    is_gone = not left and now - quiet_since > _QUIET_SECONDS
    return Killed(is_gone, tuple(killed), tuple(left), stop.problem or "it does not answer")


class _Stop:
    """``systemctl stop``, to be asked whether it is over."""

    def __init__(self, unit: str) -> None:
        self.problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                ("systemctl", "--no-ask-password", "--quiet", "stop", "--", unit),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self.problem = f"cannot run systemctl: {error}"

    def is_over(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            said = self._close(self._process)
            # 5: systemd knows no such unit (systemctl(1)), so there is nothing to stop.
            if (code := self._process.returncode) not in (0, 5):
                self.problem = said or f"systemctl exited with {code}"
            self._process = None
        return self._process is None

    def give_up(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close(self._process)

    @staticmethod
    def _close(process: subprocess.Popen[bytes]) -> str:
        assert process.stderr is not None
        with process.stderr:
            return process.stderr.read(4096).decode(errors="replace").strip()
