"""A nats-server process that outlives the one who started it, and how to find it again for certain.

The record ``<data_dir>/nats/server.json`` names the process by pid, start time and boot id: a pid
alone may belong to somebody else by now. No signal is ever sent to a process that differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

_POLL_SECONDS = 0.25
"""How often a process is looked at where the kernel has no pidfd."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process of one boot of this machine. ``config``: a digest of what the server runs with."""

    pid: int
    started: str
    boot: str
    config: str

    def write(self, path: Path) -> None:
        """Replace *path* as a whole, readable by this user only."""
        fresh = path.with_suffix(".new")
        fresh.touch(0o600)
        fresh.write_bytes(msgspec.json.encode(self))
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> ProcessRecord | None:
        """What *path* holds; None if it is absent or was never written whole."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


class ServerProcess:
    """A running server, ours or adopted. Signals go through its pidfd where there is one."""

    def __init__(self, record: ProcessRecord, child: subprocess.Popen[bytes] | None = None) -> None:
        self._pidfd: int | None = None
        self.record = record
        self._child = child
        self._pidfd = _open_pidfd(record.pid)
        if not self.is_alive():
            self._close()

    @classmethod
    def spawn(cls, command: list[str], log: Path, digest: str) -> ServerProcess:
        """Start *command* in a session of its own, so that no signal to us or our terminal reaches it."""
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        return cls(ProcessRecord(child.pid, _start_time(child.pid), _boot_id(), digest), child)

    @classmethod
    def find(cls, directory: Path) -> ServerProcess | None:
        """The server that was started for *directory* and still runs.

        A node that died between starting the server and writing its record left only the server's
        own pid file, and the digest is unknown. Start times have a grain of 10 ms, so in either case
        the command line must also be that of a nats-server with our configuration.
        """
        records = [ProcessRecord.read(directory / "server.json")]
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int((directory / "nats.pid").read_text())
            records.append(ProcessRecord(pid, _start_time(pid), _boot_id(), ""))
        for record in records:
            if record is not None and _runs_server(record.pid, directory / "nats.conf"):
                found = cls(record)
                if found.is_alive():
                    return found
        return None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.record.pid

    def is_alive(self) -> bool:
        """Whether it is still this very process, and no zombie."""
        if self._child is not None:
            return self._child.poll() is None
        started = _start_time(self.record.pid)
        return bool(started) and started == self.record.started and self.record.boot == _boot_id()

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it is alive."""
        if not self.is_alive():
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None and sys.platform == "linux":
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.record.pid, number)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended. False if it has not within *timeout* seconds (None: for ever)."""
        try:
            async with asyncio.timeout(timeout):
                await self._ended()
        except TimeoutError:
            return not self.is_alive()
        self._close()
        return True

    @property
    def how_it_ended(self) -> str:
        """In words. Of an adopted process only its parent knows the exit code."""
        code = None if self._child is None else self._child.poll()
        if code is None:
            return "ended"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    async def _ended(self) -> None:
        if self._pidfd is None:
            while self.is_alive():  # noqa: ASYNC110 - no event tells of the end of somebody else's child
                await asyncio.sleep(_POLL_SECONDS)
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        # A pidfd becomes readable when the process ends. Each waiter brings its own descriptor,
        # because a loop has room for one reader per descriptor.
        descriptor = os.dup(self._pidfd)
        loop.add_reader(descriptor, ended.set)
        try:
            if self.is_alive():
                await ended.wait()
            # It is readable a moment before the exit code can be collected.
            while self.is_alive():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def _close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def __del__(self) -> None:
        self._close()
        if self._child is not None:
            # It is meant to outlive us: without this, Popen would warn that it still runs.
            self._child.returncode = self._child.poll() or 0


def _open_pidfd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # gone already, or a kernel or sandbox without pidfd: polling does it
        return None


def _start_time(pid: int) -> str:
    """When the process started, in whatever unit the system has; empty if it is gone or a zombie."""
    if sys.platform == "linux":
        try:
            # proc_pid_stat(5): after the name in parentheses, field 3 is the state, 22 the start time.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    return _ask_ps(pid, "lstart")


def _runs_server(pid: int, config: Path) -> bool:
    if sys.platform == "linux":
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return False
        return Path(command[0]).name == "nats-server" and str(config) in command
    command = _ask_ps(pid, "command")
    return "nats-server" in command and str(config) in command


def _ask_ps(pid: int, field: str) -> str:
    answer = subprocess.run(
        ["ps", "-o", f"stat=,{field}=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
        timeout=5,
    )
    state, _, value = answer.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else value.strip()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS: lstart is absolute there, so no boot id is needed
        return ""
