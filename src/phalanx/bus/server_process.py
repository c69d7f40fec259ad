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

from phalanx import system


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process of one boot of this machine. ``config``: a digest of what the server runs with."""

    pid: int
    started: int
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
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = system.open_pidfd(record.pid)
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
        return cls(
            ProcessRecord(child.pid, system.process_start_time(child.pid), system.boot_id(), digest), child
        )

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
            records.append(_record_of(pid, ""))
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
        same = system.ProcessRef(self.record.pid, self.record.started).alive()
        return same and self.record.boot == system.boot_id()

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
        # Nothing runs between the look and the watch, so the watch is on this process and no later one.
        if self.is_alive():
            await system.wait_exit(self.record.pid)
        # It has ended a moment before its exit code can be collected.
        while self.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def _close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def __del__(self) -> None:
        self._close()
        if self._child is not None:
            # It is meant to outlive us: without this, Popen would warn that it still runs.
            self._child.returncode = self._child.poll() or 0


def _record_of(pid: int, digest: str) -> ProcessRecord:
    return ProcessRecord(pid, system.process_start_time(pid), system.boot_id(), digest)


def _runs_server(pid: int, config: Path) -> bool:
    command = system.command_line(pid)
    return bool(command) and Path(command[0]).name == "nats-server" and str(config) in command
