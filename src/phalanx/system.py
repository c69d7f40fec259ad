"""Clocks, processes and signals: the only module that asks the operating system about them.

Only the standard library is imported, so that the keeper stays small. Linux is the target. On macOS
clocks, groups, locks and notifications work; what needs ``/proc`` degrades as each docstring says.

How the processes of an active section are found again: each has ``PHALANX_SECTION=<marker>`` in its
environment (proc(5), ``/proc/<pid>/environ``: the environment at its exec, inherited by every child),
or belongs to the process group or session that the section's program leads, or descends from one of
those. The mark finds children that escaped by setsid and double forks; group and session find programs
that write over their environment (some servers do, to show a title in ps); descent finds those with a
session *and* an environment of their own (sudo with a terminal, ``env -i setsid``) while their parent
lives. So a search comes before the first signal, and it stops what it finds, so that nobody is cut off
from its parent meanwhile. What can't be found: a process without mark, in a session of its own, whose
parent has ended before anybody looked, as when the program crashes or the kernel kills it together with
the node. Those are found in their control group, where there is one (``phalanx.cgroup_v2``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

MARKER_ENV = "PHALANX_SECTION"
"""The environment variable that marks the processes of one active section."""

LINUX = sys.platform == "linux"

_POLL_SECONDS = 0.02
_STOP_SECONDS = 0.1
"""How long at most the processes of a section are searched and stopped before they are killed anyway."""
_STOP_POLL_SECONDS = 0.0002
_AT_REST = frozenset("TtDZX")
"""States in which a thread runs no code of its own. D: it waits in the kernel, as a parent in vfork(2)."""
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
        fields = _stat_fields(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[6]), int(fields[17]), int(fields[19]))


def _stat_fields(path: str) -> list[bytes]:
    # proc_pid_stat(5); the name in parentheses may hold anything, the state follows the last ")".
    return _read(path).rpartition(b")")[2].split()


def _read(path: str) -> bytes:
    """A file of /proc; raises OSError. Several times as fast as open()."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    chunks: list[bytes] = []
    try:
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    finally:
        os.close(descriptor)
    return b"".join(chunks)


def process_start_time(pid: int) -> int:
    """When *pid* started: clock ticks since boot (macOS: Unix seconds). 0 if there is no such process."""
    if LINUX:
        stat = _stat(pid)
        return stat.start_time if stat else 0
    started = _output("ps", "-o", "lstart=", "-p", str(pid))
    return int(time.mktime(time.strptime(started))) if started else 0


def process_age_seconds(start_time: int) -> float:
    """How long a process of that start time has run."""
    return now() - start_time / os.sysconf("SC_CLK_TCK") if LINUX else wall() - start_time


def is_running(pid: int) -> bool:
    """Whether *pid* is there and no zombie."""
    if LINUX:
        stat = _stat(pid)
        return stat is not None and not stat.dead
    return not _output("ps", "-o", "stat=", "-p", str(pid)).startswith("Z") and process_start_time(pid) != 0


def is_stopped(pid: int) -> bool:
    """Whether *pid* stands still by a signal (SIGSTOP) or a debugger. False where nobody can tell (macOS)."""
    stat = _stat(pid) if LINUX else None
    return stat is not None and stat.state in ("T", "t")


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
    _refuse_own(pgid)
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Of a group of zombies macOS says this; on Linux, that no member may be signalled.
        return False
    return True


def _refuse_own(pgid: int) -> None:
    if pgid <= 1 or pgid == os.getpgrp():
        raise ValueError(f"refusing to signal process group {pgid}")


def find_marked(marker: str, pgid: int | None = None) -> list[int]:
    """The pids of what :func:`find_processes` finds."""
    return [process.pid for process in find_processes(marker, pgid)]


def find_processes(
    marker: str, pgid: int | None = None, *, start_time: int = 0, known: Iterable[ProcessRef] = ()
) -> list[ProcessRef]:
    """The running processes of a section: marked, or in group or session *pgid*, and their descendants.

    *start_time*: of the group's leader where known; if another process has that pid by now, the group is
    somebody else's. *known*: what an earlier search found; what of it still runs, and what descends from
    that, belongs too.
    Never this process nor an ancestor of it. Processes of other users are seen only by root.
    On macOS the result is always empty: only groups can be killed there. Raises OSError.
    """
    if not LINUX:
        return []
    if pgid is not None and not _is_group_of(pgid, start_time):
        pgid = None
    return [ProcessRef(*one) for one in _scan(marker, pgid, dict(known), _spared()).found.items()]


def kill_marked(
    marker: str,
    pgid: int | None = None,
    *,
    start_time: int = 0,
    known: Iterable[ProcessRef] = (),
    deadline_seconds: float = 2.0,
) -> KillReport:
    """SIGKILL all that :func:`find_processes` finds, until nobody is left.

    First all are found and stopped, then killed: the death of a parent would hide its children, and
    nobody can fork away. It ends when two searches in a row found nobody and every killed process is dead
    (so its sockets are closed), or at the deadline.
    Blocks: a few ms as a rule. Raises OSError if /proc can't be read; the group was killed then.
    """
    began = now()
    deadline = began + deadline_seconds
    if pgid is not None and not _is_group_of(pgid, start_time):
        pgid = None
    if pgid is not None:
        _refuse_own(pgid)
    if not LINUX:
        return _wait_group(pgid, began, deadline)
    ours, killed = dict(known), dict[int, int]()
    try:
        spared, clean = _spared(), 0
        while clean < 2:
            scan = _find_and_stop(marker, pgid, ours, spared, deadline)
            clean = 0 if scan.found or scan.unclear else clean + 1
            alive = _kill_and_wait(scan.found, deadline)
            killed.update(scan.found)
            if now() >= deadline and clean < 2:
                return KillReport(tuple(killed), tuple(alive), now() - began)
            if scan.unclear and not scan.found:
                time.sleep(0.0005)
    except OSError:
        # No descriptor is left, for one: what can be killed without looking must not go on.
        if pgid is not None:
            kill_group(pgid)
        raise
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


def _find_and_stop(
    marker: str, pgid: int | None, ours: dict[int, int], spared: set[int], deadline: float
) -> _Scan:
    """Search and SIGSTOP until a search finds nobody new, all stopped; notes all in *ours* as well."""
    found: dict[int, int] = {}
    limit = min(deadline, now() + _STOP_SECONDS)
    while True:
        scan = _scan(marker, pgid, ours, spared)
        new = {pid: started for pid, started in scan.found.items() if found.get(pid) != started}
        found.update(new)
        ours.update(new)
        if not new or now() >= limit:
            return _Scan(found, scan.unclear)
        # A fork that was under way when the signal came has ended once its thread is at rest.
        moving = [pid for pid, started in new.items() if _send(pid, started, signal.SIGSTOP)]
        while (moving := [pid for pid in moving if not _at_rest(pid)]) and now() < limit:
            time.sleep(_STOP_POLL_SECONDS)


def _send(pid: int, started: int, number: int) -> bool:
    """Signal this very process; False if it is gone, or we may not."""
    if process_start_time(pid) != started:
        return False
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _at_rest(pid: int) -> bool:
    """Whether none of its threads runs code of the program (or it is gone)."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if _stat_fields(f"/proc/{pid}/task/{thread}/stat")[0].decode() not in _AT_REST:
                    return False
    except (FileNotFoundError, ProcessLookupError):
        pass
    return True


def _scan(marker: str, pgid: int | None, known: dict[int, int], spared: set[int]) -> _Scan:
    entry = f"{MARKER_ENV}={marker}".encode()
    found: dict[int, int] = {}
    unclear = False
    for pid, started in known.items():
        if process_start_time(pid) == started:
            _add_with_children(pid, found, spared)
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
        return _read(f"/proc/{pid}/environ")
    except (FileNotFoundError, PermissionError):
        return b""


def _add_with_children(pid: int, found: dict[int, int], spared: set[int]) -> None:
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        if one in found or one in spared or (stat := _stat(one)) is None:
            continue
        if not stat.dead:
            found[one] = stat.start_time
        waiting += _children(one)


@cache
def _has_children_files() -> bool:
    return os.path.exists("/proc/thread-self/children")


def _children(pid: int) -> list[int]:
    """The children of all its threads: each has a list of its own."""
    if not _has_children_files():  # a kernel without CONFIG_PROC_CHILDREN
        stats = ((other, _stat(other)) for other in _pids())
        return [other for other, stat in stats if stat is not None and stat.parent == pid]
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                children += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    return children


def _lives(pid: int, started: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat.start_time == started and not stat.dead


def _kill_and_wait(victims: dict[int, int], deadline: float) -> list[int]:
    """SIGKILL each of *victims* (start times by pid), wait for their ends; who is still alive."""
    poll, watched = select.poll(), dict[int, int]()
    try:
        for pid, started in victims.items():
            with contextlib.suppress(ProcessLookupError):
                descriptor = open_pidfd(pid)
                if descriptor is not None:
                    watched[descriptor] = pid
                # One that we may not signal is waited for as well: it is alive, and that is reported.
                if _send(pid, started, signal.SIGKILL) and descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
        alive = list(victims)
        while (alive := [pid for pid in alive if _lives(pid, victims[pid])]) and now() < deadline:
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

    def fileno(self) -> int:
        """The open file: whoever has it open too, holds the lock with us. Raises ValueError once released."""
        if self._descriptor is None:
            raise ValueError("the lock was released")
        return self._descriptor

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
