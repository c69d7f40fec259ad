"""Network namespaces of Linux, by the programs of iproute2 and nftables: what a lab is made of."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path("/run/netns")
"""Where ``ip netns`` keeps names of namespaces."""

PROGRAMS = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
"""What is called here, and the Debian package that has it."""

END_SECONDS = 10.0
"""How long killed processes may take to be gone."""

_OF_A_LAB = re.compile(r"phx-(\d+)-\d+-\w+")
_CLONE_NEWNET = 0x40000000  # linux/sched.h


class NetLabError(RuntimeError):
    """A lab cannot be had here, or a command of it failed; says what is missing."""


def require() -> None:
    """Raise NetLabError, which names all that is missing, where no namespaces can be made."""
    missing = [f"{program} ({package})" for program, package in PROGRAMS.items() if not shutil.which(program)]
    if os.geteuid() != 0:
        missing.append("root's rights")
    if missing:
        raise NetLabError(f"network namespaces need {', '.join(missing)}")


def name(number: int, part: str) -> str:
    """The name of a namespace of this process's lab *number*; ``remove_leftovers`` knows it by that."""
    return f"phx-{os.getpid()}-{number}-{part}"


def add(namespace: str) -> None:
    """Make a namespace. Raises NetLabError."""
    run(["ip", "netns", "add", namespace])


def delete(namespace: str) -> None:
    """Remove its name; it is gone with the last process in it. Harmless when done twice."""
    # Another lab may have removed it as a left-over at the same moment.
    if (FOLDER / namespace).exists():
        run(["ip", "netns", "del", namespace], check=False)


def command(namespace: str, *command: str) -> list[str]:
    """*command*, as it has to be started to run in the namespace. Its process id stays the same."""
    return ["nsenter", f"--net={FOLDER / namespace}", "--", *command]


def enter(namespace: str) -> None:
    """Move the calling *thread* into a namespace, for good. Raises OSError."""
    descriptor = os.open(FOLDER / namespace, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
        if libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)


def ip(namespace: str, *arguments: str) -> str:
    """``ip`` in a namespace: its output. Raises NetLabError."""
    return run(["ip", "-n", namespace, *arguments]).stdout


def nft(namespace: str, script: str) -> None:
    """Carry out an nftables script in a namespace, as a whole or not at all. Raises NetLabError."""
    run(command(namespace, "nft", "-f", "-"), stdin=script)


def run(
    command: Sequence[str],
    *,
    stdin: str = "",
    timeout: float = 30.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. With *check*, NetLabError with its output when it fails."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, env=env
    )
    if check and done.returncode:
        output = (done.stderr or done.stdout).strip()
        raise NetLabError(f"{' '.join(command)} ended with {done.returncode}: {output}")
    return done


def pids(namespace: str) -> list[int]:
    """Every process in a namespace, but this one."""
    if not (FOLDER / namespace).exists():
        return []
    listed = run(["ip", "netns", "pids", namespace], check=False).stdout
    return [pid for pid in map(int, listed.split()) if pid != os.getpid()]


def end_processes(namespace: str) -> None:
    """SIGKILL everything in a namespace, also what is started meanwhile. Raises NetLabError."""
    deadline = time.monotonic() + END_SECONDS
    while found := pids(namespace):
        if time.monotonic() > deadline:
            raise NetLabError(f"processes {found} in {namespace} do not end")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def remove_leftovers() -> list[str]:
    """Remove the namespaces of labs whose process is gone, with all that runs in them; their names."""
    found: list[str] = []
    for path in sorted(FOLDER.glob("phx-*")):
        match = _OF_A_LAB.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            end_processes(path.name)
            delete(path.name)
            found.append(path.name)
    return found
