"""Clocks, processes and signals: the only module that asks the operating system about them.

Only the standard library is imported, so that the keeper stays small. Linux is the target. On macOS
clocks, groups, locks and notifications work; what needs ``/proc`` degrades as each docstring says.

How the processes of an active section are found again: each has ``PHALANX_SECTION=<marker>`` in its
environment (proc(5), ``/proc/<pid>/environ``: the environment at its exec, inherited by every child),
or belongs to the process group or session that the section's program leads. The mark finds children
that escaped by setsid and double forks; group and session find programs that write over their
environment (some servers do, to show a title in ps). A daemon that does both can only be found while
its parent lives: such programs must be run in the foreground, as under any supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MARKER_ENV = "PHALANX_SECTION"
"""The environment variable that marks the processes of one active section."""

LINUX = sys.platform == "linux"

_POLL_SECONDS = 0.02
_PF_EXITING = 0x4

# --- clocks


if sys.platform == "linux":

    def now() -> float:
        """Seconds since boot, time asleep included (CLOCK_BOOTTIME). Never set, never goes back."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:

    def now() -> float:
        """Seconds at a steady rate. On macOS time asleep is not counted."""
        return time.monotonic()


def wall() -> float:
    """Unix seconds, for people and records only: it may jump."""
    return time.time()


def boot_id() -> str:
    """Names this boot and, on Linux, this PID namespace: process ids mean nothing outside of both."""
    if LINUX:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return _output("sysctl", "-n", "kern.bootsessionuuid")


def _output(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    return answer.stdout.strip()


# --- one process


class _Stat(NamedTuple):
    state: str
    parent: int
    flags: int
    threads: int
    start_time: int

    @property
    def dead(self) -> bool:
        # A zombie leader whose other threads still run is no dead process.
        return self.state in "ZX" and self.threads <= 1


def _stat(pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc_pid_stat(5); the name in parentheses may hold anything, the state follows the last ")".
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[6]), int(fields[17]), int(fields[19]))


def process_start_time(pid: int) -> int:
    """When *pid* started: clock ticks since boot (macOS: Unix seconds). 0 if there is no such process."""
    if LINUX:
        stat = _stat(pid)
        return stat.start_time if stat else 0
    started = _output("ps", "-o", "lstart=", "-p", str(pid))
    return int(time.mktime(time.strptime(started))) if started else 0


def is_running(pid: int) -> bool:
    """Whether *pid* is there and no zombie."""
    if LINUX:
        stat = _stat(pid)
        return stat is not None and not stat.dead
    return not _output("ps", "-o", "stat=", "-p", str(pid)).startswith("Z") and process_start_time(pid) != 0


def command_line(pid: int) -> list[str]:
    """The program and arguments of *pid*; empty if it is gone. macOS: split at every space."""
    if not LINUX:
        return _output("ps", "-o", "command=", "-p", str(pid)).split()
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(argument) for argument in data.removesuffix(b"\0").split(b"\0")] if data else []


class ProcessRef(NamedTuple):
    """A process for certain: a pid alone may belong to somebody else by now."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """The process that has *pid* now."""
        return cls(pid, process_start_time(pid))

    def alive(self) -> bool:
        """Whether this very process runs. Zombies count as dead."""
        return (
            self.start_time != 0 and process_start_time(self.pid) == self.start_time and is_running(self.pid)
        )


def open_pidfd(pid: int) -> int | None:
    """A descriptor of *pid*, readable once it has ended; the caller closes it. See pidfd_open(2).

    None where the kernel or a sandbox has no pidfd. Raises ProcessLookupError if there is no such process.
    """
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from None
        return None


def watch_exit(pid: int, on_exit: Callable[[], None]) -> Callable[[], None] | None:
    """Call *on_exit* once, from the running loop, when *pid* has ended (or had already).

    Returns a function that ends the watch, or None where processes can't be watched (no pidfd).
    """
    loop = asyncio.get_running_loop()
    try:
        descriptor = open_pidfd(pid)
    except ProcessLookupError:
        return loop.call_soon(on_exit).cancel
    if descriptor is None:
        return None
    open_descriptors = [descriptor]

    def close() -> None:
        while open_descriptors:
            loop.remove_reader(open_descriptors[0])
            os.close(open_descriptors.pop())

    def ended() -> None:
        close()
        on_exit()

    loop.add_reader(descriptor, ended)
    return close


async def wait_exit(pid: int) -> None:
    """Wait until *pid* has ended: it is a zombie, or gone. The caller sets the deadline."""
    ended = asyncio.Event()
    close = watch_exit(pid, ended.set)
    if close is None:
        while is_running(pid):  # noqa: ASYNC110 - nothing tells of it here
            await asyncio.sleep(_POLL_SECONDS)
        return
    try:
        await ended.wait()
    finally:
        close()


# --- killing all processes of a section


class KillReport(NamedTuple):
    """What :func:`kill_marked` did. ``remaining``: pids that do not die; empty means all are gone."""

    killed: tuple[int, ...]
    remaining: tuple[int, ...]
    seconds: float


def kill_group(pgid: int, number: int = signal.SIGKILL) -> bool:
    """Signal a process group; False if there is none. Never our own, nor "every process"."""
    if pgid <= 1 or pgid == os.getpgrp():
        raise ValueError(f"refusing to signal process group {pgid}")
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Of a group of zombies macOS says this; on Linux, that no member may be signalled.
        return False
    return True


def find_marked(marker: str, pgid: int | None = None) -> list[int]:
    """The running processes of a section: marked, or in group or session *pgid*, or children of those.

    Never this process nor an ancestor of it. Processes of other users are seen only by root.
    On macOS the result is always empty: only groups can be killed there.
    """
    return list(_scan(marker, pgid, _spared()).found) if LINUX else []


def kill_marked(
    marker: str, pgid: int | None = None, *, start_time: int = 0, deadline_seconds: float = 2.0
) -> KillReport:
    """SIGKILL the group *pgid* and all that :func:`find_marked` finds, until nobody is left.

    It ends when two scans in a row found nobody and every killed process is dead (so its sockets are
    closed), or at the deadline. *start_time*: of the group's leader where known; if another process has
    that pid by now, the group is somebody else's and is left alone. Blocks: a few ms as a rule.
    """
    began = now()
    deadline = began + deadline_seconds
    if pgid is not None and not _is_group_of(pgid, start_time):
        pgid = None
    if pgid is not None:
        kill_group(pgid)
    if not LINUX:
        return _wait_group(pgid, began, deadline)
    killed: dict[int, int] = {}
    spared, clean = _spared(), 0
    while clean < 2:
        scan = _scan(marker, pgid, spared)
        clean = 0 if scan.found or scan.unclear else clean + 1
        alive = _kill_and_wait(scan.found, deadline)
        killed.update(scan.found)
        if now() >= deadline and clean < 2:
            return KillReport(tuple(killed), tuple(alive), now() - began)
        if scan.unclear and not scan.found:
            time.sleep(0.0005)
    return KillReport(tuple(killed), (), now() - began)


def _is_group_of(pgid: int, start_time: int) -> bool:
    found = process_start_time(pgid) if start_time else 0
    return not found or found == start_time


def _wait_group(pgid: int | None, began: float, deadline: float) -> KillReport:
    if pgid is None:
        return KillReport((), (), now() - began)
    while alive := kill_group(pgid):
        if now() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    return KillReport((pgid,), (pgid,) if alive else (), now() - began)


def _spared() -> set[int]:
    """This process and its ancestors."""
    spared, pid = {0, 1}, os.getpid()
    while pid not in spared:
        spared.add(pid)
        stat = _stat(pid)
        pid = stat.parent if stat else 0
    return spared


class _Scan(NamedTuple):
    found: dict[int, int]
    """Start times by pid."""
    unclear: bool
    """Somebody is just exiting and has dropped its environment, but perhaps not yet its sockets."""


def _scan(marker: str, pgid: int | None, spared: set[int]) -> _Scan:
    entry = f"{MARKER_ENV}={marker}".encode()
    found: dict[int, int] = {}
    unclear = False
    for pid in _pids():
        if pid in spared:
            continue
        try:
            group = os.getpgid(pid)
            ours = pgid is not None and (group == pgid or os.getsid(pid) == pgid)
            environment = b"" if ours else _environment(pid)
        except (ProcessLookupError, PermissionError):
            continue
        if ours or entry in environment.split(b"\0"):
            _add_with_children(pid, found, spared)
        elif not environment and group != 0:  # group 0: a kernel thread
            stat = _stat(pid)
            unclear |= stat is not None and not stat.dead and bool(stat.flags & _PF_EXITING)
    return _Scan(found, unclear)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _environment(pid: int) -> bytes:
    """The environment of *pid*; empty for kernel threads, zombies, and whatever we may not see."""
    try:
        descriptor = os.open(f"/proc/{pid}/environ", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return b""
    chunks: list[bytes] = []
    try:
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    finally:
        os.close(descriptor)
    return b"".join(chunks)


def _add_with_children(pid: int, found: dict[int, int], spared: set[int]) -> None:
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        stat = _stat(one)
        if one in found or one in spared or stat is None:
            continue
        if not stat.dead:
            found[one] = stat.start_time
        # Kernels without CONFIG_PROC_CHILDREN lack this file; the mark finds children there too.
        with contextlib.suppress(OSError), open(f"/proc/{one}/task/{one}/children", "rb") as file:
            waiting += [int(child) for child in file.read().split()]


def _kill_and_wait(victims: dict[int, int], deadline: float) -> list[int]:
    """SIGKILL each of *victims* (start times by pid), wait for their ends; who is still alive."""
    poll, watched = select.poll(), dict[int, int]()
    try:
        for pid, started in victims.items():
            with contextlib.suppress(ProcessLookupError):
                descriptor = open_pidfd(pid)
                if descriptor is not None:
                    watched[descriptor] = pid
                if process_start_time(pid) != started:
                    continue
                os.kill(pid, signal.SIGKILL)
                if descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
        while (alive := [p for p, s in victims.items() if ProcessRef(p, s).alive()]) and now() < deadline:
            left_ms = max(1, min(5, int((deadline - now()) * 1000)))
            for descriptor, _ in poll.poll(left_ms):
                poll.unregister(descriptor)
        return alive
    finally:
        for descriptor in watched:
            os.close(descriptor)


# --- this process


def set_pdeathsig(number: int = signal.SIGKILL) -> None:
    """Have the kernel send *number* to this process when the thread that started it ends (Linux).

    See prctl(2), PR_SET_PDEATHSIG. Raises OSError, and NotImplementedError elsewhere.
    """
    if not LINUX:
        raise NotImplementedError("the parent-death signal exists on Linux only")
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(1, number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def raise_nofile_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports "unlimited" but refuses it (OPEN_MAX).
    wanted = hard if LINUX or hard != resource.RLIM_INFINITY else 10240
    if soft != wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def notify(state: str) -> bool:
    """Tell the service manager, for example ``READY=1`` (sd_notify(3)). False if there is none.

    Several assignments are separated by newlines. Raises OSError if there is one but it can't be told.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace, unix(7)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(1.0)
        channel.sendto(state.encode(), address)
    return True


def watchdog_interval() -> float | None:
    """How often ``WATCHDOG=1`` is due: half of the manager's limit, in seconds; None if not wanted."""
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(limit) / 2_000_000 or None


class FileLock:
    """A held lock. The kernel drops it when the process ends, however it ends."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor: int | None = descriptor
        self.path = path

    def release(self) -> None:
        """Give it up; twice is harmless. The file stays: removing it would race with others."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(path: Path) -> FileLock:
    """Lock *path* (flock(2)), creating it, and write our pid there.

    Raises BlockingIOError, whose ``strerror`` names the holder's pid, if another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise BlockingIOError(errno.EWOULDBLOCK, f"locked by process {holder}", str(path)) from None
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(descriptor, path)
