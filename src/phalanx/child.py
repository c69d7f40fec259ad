"""Programs that the node starts: spawned in a thread, watched by pidfd, their output read with limits.

A child stays a zombie until :meth:`Child.reap`, so its pid, and its process group's number, can't become
somebody else's while we may still signal them. Nothing here waits for the end of an output: a grandchild
that escaped may hold the pipe for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import IO, TypeVar

from phalanx import system

T = TypeVar("T")

MAX_LINE_BYTES = 4096
"""A longer line is logged in pieces."""
LINES_A_TURN = 64
LOOP_SHARE = 0.2
"""The part of the event loop's time that one program's output may take: then the program has to wait."""
LAST_LINES = 100
"""Of what is still in the pipe when a program is gone, that many lines are shown."""

_READ_BYTES = 4096
_LEFT_BYTES = 1 << 18
_LONGEST_REST_SECONDS = 0.25
_REAP_SECONDS = 1.0

_MANAGER_VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)

# Threads of our own: the default ones may all be taken by a user's blocking functions, and a kill can't wait.
_threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="phalanx-child")


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Call *function*, which starts, finds or kills processes, in a thread that nothing else uses."""
    return asyncio.get_running_loop().run_in_executor(_threads, function)


async def finish(work: asyncio.Future[T]) -> T:
    """Wait for the end of *work*, whatever happens: a cancellation is raised only after it."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # seen: the cancellation is what the caller has to know
        raise cancelled
    return work.result()


def environment() -> dict[str, str]:
    """The node's own environment, without what the service manager says to the node alone."""
    return {name: text for name, text in os.environ.items() if name not in _MANAGER_VARIABLES}


@cache
def dies_with_node() -> tuple[str, ...]:
    """What to put before a command, so that the kernel kills it when the node's process ends (Linux).

    The keeper kills it too, and better: all of its processes. This is for the case that node and keeper
    are killed at once, so that nobody is left who could: the program must not outlive the session then.
    setpriv (util-linux) sets prctl(2) PR_SET_PDEATHSIG and becomes the program. It does nothing for a node
    that dies before that.
    """
    setpriv = shutil.which("setpriv") if system.LINUX else None
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


class Identity:
    """Whom a program runs as."""

    def __init__(self, user: int, group: int, groups: Sequence[int]) -> None:
        self.user, self.group, self.groups = user, group, tuple(groups)


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str = "",
    identity: Identity | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start *command* as leader of a session of its own, output to one pipe. Blocks: until its exec.

    Raises OSError. No preexec_fn: in a process with threads it may deadlock.
    """
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd or None,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        close_fds=True,
        start_new_session=True,
        user=identity.user if identity else None,
        group=identity.group if identity else None,
        extra_groups=identity.groups if identity else None,
    )


class Child:
    """A spawned program. ``exited`` is set once it has ended, and ``how`` then says how."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        on_line: Callable[[str], None],
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        assert process.stdout is not None
        self._process, self._on_exit = process, on_exit
        self.pid = process.pid
        self.start_time = system.process_start_time(process.pid)
        self.exited = asyncio.Event()
        self.how, self.code = "", 0
        self.output = Output(process.stdout, on_line)
        self._watching: asyncio.Task[None] | None = None
        self._end_watch = system.watch_exit(self.pid, self._ended)
        if self._end_watch is None:
            self._watching = asyncio.create_task(self._watch(), name=f"watch process {self.pid}")

    async def _watch(self) -> None:
        await system.wait_exit(self.pid)
        self.look()

    def _ended(self) -> None:
        self.look()

    def look(self) -> bool:
        """Whether it has ended, as of now; notes how."""
        if self.exited.is_set():
            return True
        code = _exit_code(self._process)
        if code is None:
            return False
        self.code, self.how = code, how_ended(code)
        self.exited.set()
        self._on_exit()
        return True

    def signal_group(self, number: int) -> None:
        """Signal the program and all of its process group; nothing once it was reaped."""
        if self._process.returncode is None:
            system.kill_group(self.pid, number)

    def reap(self) -> None:
        """Let go of a program that has ended: its pid, and what is left in its pipe. Twice is harmless."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_SECONDS)
        if self._end_watch is not None:
            self._end_watch()
        if self._watching is not None:
            self._watching.cancel()
        self.output.close()


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """How it ended, as Popen has it (a signal is negative); None if it runs. It stays a zombie."""
    if process.returncode is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll()
    try:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody in this process waits for children that are not his
        return process.poll()
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def how_ended(code: int) -> str:
    """An exit code as Popen has it, in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Output:
    """Reads a program's pipe and hands on its lines, a few a turn.

    It takes at most ``LOOP_SHARE`` of the loop's time and keeps at most two reads in memory; a program that
    writes faster fills its pipe and waits, as it would for a slow terminal.
    """

    def __init__(self, stream: IO[bytes], on_line: Callable[[str], None]) -> None:
        self._stream, self._on_line = stream, on_line
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._open = True
        self.last_line = ""
        self._timer: asyncio.TimerHandle | None = None
        os.set_blocking(stream.fileno(), False)
        self._loop.add_reader(stream.fileno(), self._turn)

    def _turn(self) -> None:
        began = system.now()
        at_end = not self._has_line() and not self._read()
        for _ in range(LINES_A_TURN):
            if not self._has_line():
                break
            self._emit(self._take())
        if at_end:
            self.close()
            return
        self._loop.remove_reader(self._stream.fileno())
        rest = (system.now() - began) * (1 / LOOP_SHARE - 1)
        self._timer = self._loop.call_later(min(rest, _LONGEST_REST_SECONDS), self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        if self._has_line():
            self._turn()
        else:
            self._loop.add_reader(self._stream.fileno(), self._turn)

    def _read(self, limit: int = _READ_BYTES) -> bool:
        """Read once; False at the end of the stream."""
        try:
            data = os.read(self._stream.fileno(), limit)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._buffer += data
        return bool(data)

    def _has_line(self) -> bool:
        return len(self._buffer) >= MAX_LINE_BYTES or b"\n" in self._buffer

    def _take(self) -> bytes:
        end = self._buffer.find(b"\n", 0, MAX_LINE_BYTES)
        cut = end if end >= 0 else MAX_LINE_BYTES
        line = bytes(self._buffer[:cut])
        del self._buffer[: cut + (end >= 0)]
        return line

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self.last_line = text
            self._on_line(text)

    def drain(self) -> None:
        """Hand on what is in the pipe right now, of much only the last lines. Never waits."""
        if not self._open:
            return
        before = -1
        while before < len(self._buffer) < _LEFT_BYTES:
            before = len(self._buffer)
            self._read(1 << 16)
        lines = [line for line in bytes(self._buffer).split(b"\n") if line]
        self._buffer.clear()
        if len(lines) > LAST_LINES:
            self._on_line(f"[{len(lines) - LAST_LINES} lines left out]")
        for line in lines[-LAST_LINES:]:
            for at in range(0, len(line), MAX_LINE_BYTES):
                self._emit(line[at : at + MAX_LINE_BYTES])

    def close(self) -> None:
        """Hand on the rest and close the pipe. Twice is harmless."""
        if not self._open:
            return
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.remove_reader(self._stream.fileno())
        self.drain()
        self._open = False
        self._stream.close()
